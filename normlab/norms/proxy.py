"""Proxy Normalization. Labatie, Masters, Eaton-Rosen & Luschi 2021, arXiv:2106.03743.

Layer or group normalization leaves channels with unequal means and deviations after the activation
φ. So each channel is normalized by the moments that φ would have on a Gaussian proxy:

    y = φ(γ x̂ + β),   z ~ N(0, 1),   proxy = φ(γ ((1 + γ̃) z + β̃) + β)
    output = (y − mean(proxy)) / √(var(proxy) + ε̃)

with x̂ from layer normalization (one group, the default) or group normalization, γ̃ and β̃ learned
from 0. No value of the batch enters the second step, and there is no state.

From the official code (Graphcore's examples): the form of the proxy, its moments over 200 quantiles
of the Gaussian, ε̃ = 0.03. That code decays γ̃ and β̃ and nothing else of the layer; here they have
the role `norm_extra` of `optim.decay_roles`. It computes the moments inside its optimizer, once a
step; here they are part of the layer, which is the same gradient. Where a model has no activation
(the last normalizer of a residual branch) there is no proxy, and this is group normalization.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.scipy.special import ndtri
from jax.typing import DTypeLike

from normlab.norms.examples import normalize_groups, prepare
from normlab.norms.functional import affine
from normlab.norms.group import divide_channels, settled_groups
from normlab.norms.normalizer import (
    Activation,
    AffineNormalizer,
    Facts,
    output_dtype,
    scale_and_bias,
)

QUANTILES = 200


class ProxyNorm(AffineNormalizer):
    """Layer or group normalization, then an activation normalized by its Gaussian proxy. No state.

    Parameters: `scale`, `bias` [C], with an activation `proxy_scale` (γ̃) and `proxy_bias` (β̃) [C].
    """

    num_groups: int = 1  # groups of channels; 1: layer normalization over all
    epsilon: float = 1e-5  # added to the variance, inside the root
    proxy_epsilon: float = 0.03  # added to the proxy's variance, inside the root
    activation: Activation | None = nn.relu  # the model's, which it applies and normalizes
    strict: bool = True  # refuse a grouping that does not divide the channels, or settle it

    replaces_activation: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(
        over="H W C", passes=(2, 3), equals=("group_norm: no activation",)
    )

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C].

        An example with nothing unmasked is normalized by its own values. Raises ValueError if the
        groups do not divide the channels and `strict` is set.
        """
        groups = self.groups_of(x.shape[-1])
        scale, bias = scale_and_bias(self, x.shape[-1:])
        x, mask = prepare(x, mask)
        y = normalize_groups(self, x, groups, mask, scale, bias)
        if self.activation is not None:
            proxy = self._proxy(scale, bias, x.shape[-1], y.dtype)
            inverse_std = jax.lax.rsqrt(proxy.var(0) + self.proxy_epsilon)
            y = (self.activation(y) - proxy.mean(0)) * inverse_std
        return y.astype(output_dtype(self, x))

    def _proxy(
        self, scale: Array | None, bias: Array | None, channels: int, dtype: DTypeLike
    ) -> Array:
        """Returns the activation of the proxy variable at each quantile: [QUANTILES, C]."""
        zeros = nn.initializers.zeros
        proxy_scale = self.param("proxy_scale", zeros, (channels,), self.param_dtype)
        proxy_bias = self.param("proxy_bias", zeros, (channels,), self.param_dtype)
        quantiles = ndtri((jnp.arange(QUANTILES, dtype=dtype) + 0.5) / QUANTILES)[:, None]
        assert self.activation is not None
        return self.activation(affine((1 + proxy_scale) * quantiles + proxy_bias, scale, bias))

    def groups_of(self, channels: int) -> int:
        """Returns the number of groups for this many channels (see `divide_channels`)."""
        return divide_channels(channels, self.num_groups, strict=self.strict)

    def note(self, channels: int) -> str:
        """Returns that the groups are settled otherwise than wished; "" if they are not."""
        return settled_groups(channels, self.num_groups)
