"""EvoNorm-S0. Liu, Brock, Simonyan & Le 2020, arXiv:2004.02967, table 2.

y = x σ(v x)/√(s² + ε) · γ + β with s² the variance of one example over positions and a group of
channels, v per channel from 1, σ the sigmoid: normalizer and activation in one. The dividend is not
centered. Training and inference are the same.

Notes:
* Where a model has no activation (the last normalizer of a residual branch) the official code
  (`nonlinearity=False`) applies γ and β alone and normalizes nothing; so does this.
* 32 groups, ε = 10⁻⁵ and the biased variance are the official code's; where 32 does not divide the
  channels it takes the next lower number that does, as the factory does here.
* A group of a single value (one position, as in an mlp, and a group of one channel) has no spread,
  and dividing by √ε would blow it up 316 times: it is divided by 1. With up to 32 units an mlp
  needs fewer groups, or this is the activation x σ(v x) and no normalizer.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from normlab.norms.examples import group_moments, prepare
from normlab.norms.functional import affine, rescale, statistics_dtype
from normlab.norms.group import divide_channels, settled_groups
from normlab.norms.normalizer import (
    Activation,
    AffineNormalizer,
    Facts,
    output_dtype,
    scale_and_bias,
)


class EvoNormS0(AffineNormalizer):
    """Divides x σ(v x) by the deviation of a group of channels of the example. No state.

    Parameters: `scale`, `bias` [C], with an activation `v` [C].
    """

    num_groups: int = 32  # groups of channels
    epsilon: float = 1e-5  # added to the variance, inside the root
    activation: Activation | None = nn.relu  # the model's, which it replaces whatever it is
    strict: bool = True  # refuse a grouping that does not divide the channels, or settle it

    replaces_activation: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(over="H W C/G", passes=(2, 3))

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C].

        An example with nothing unmasked is normalized by its own values. Raises ValueError if the
        groups do not divide the channels and `strict` is set.
        """
        groups = self.groups_of(x.shape[-1])
        scale, bias = scale_and_bias(self, x.shape[-1:])
        x, mask = prepare(x, mask)
        if self.activation is None:
            y = affine(x.astype(statistics_dtype(x.dtype)), scale, bias)
        else:
            v = self.param("v", nn.initializers.ones, x.shape[-1:], self.param_dtype)
            group, _ = group_moments(self, x, groups, mask)
            inverse_std = jnp.where(group.count > 1, jax.lax.rsqrt(group.var + self.epsilon), 1)
            y = _gated(x, v, inverse_std, scale, bias)
        return y.astype(output_dtype(self, x))

    def groups_of(self, channels: int) -> int:
        """Returns the number of groups for this many channels (see `divide_channels`)."""
        return divide_channels(channels, self.num_groups, strict=self.strict)

    def note(self, channels: int) -> str:
        """Returns that the groups are settled otherwise than wished; "" if they are not."""
        return settled_groups(channels, self.num_groups)


@jax.checkpoint  # the gradient makes the sigmoid again from x
def _gated(
    x: Array, v: Array, inverse_std: Array, scale: Array | None, bias: Array | None
) -> Array:
    values = x.astype(statistics_dtype(x.dtype))
    return rescale(values * nn.sigmoid(v * values), inverse_std, scale, bias)
