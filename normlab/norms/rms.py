"""Root Mean Square Layer Normalization. Zhang & Sennrich 2019, arXiv:1910.07467.

y = x / √(mean(x²) + ε) · γ (eq. 4): no centering. The paper has no bias; `use_bias` adds one.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from normlab.norms.examples import check_axes, prepare, standardize_channels
from normlab.norms.functional import mean_square, rescale
from normlab.norms.normalizer import (
    AffineNormalizer,
    Facts,
    note_nonfinite,
    output_dtype,
    scale_and_bias,
)


class RMSNorm(AffineNormalizer):
    """Divides each example (or position) by the root mean square of its features. No state."""

    axes: str = "all"  # statistics over: all (H, W, C of an example) or channel (last axis)
    epsilon: float = 1e-5  # added to the mean square, inside the root
    elementwise: bool = False  # a gain per element instead of per channel
    use_bias: bool = False  # learn an offset; the paper has none

    facts: ClassVar[Facts] = Facts(
        over="H W C", passes=(2, 3), equals=("layer_norm: values of mean 0",)
    )

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C].

        An example with nothing unmasked is normalized by its own values; over `channel` a mask
        makes no difference, since positions share nothing.
        """
        check_axes(self.axes)
        over_all = self.axes == "all" and x.ndim > 2
        shape = x.shape[1:] if self.elementwise and over_all else x.shape[-1:]
        scale, bias = scale_and_bias(self, shape)
        x, mask = prepare(x, mask)
        if over_all:
            square = mean_square(x, tuple(range(1, x.ndim)), mask)
            note_nonfinite(self, jnp.isfinite(square).all())
            y = rescale(x, jax.lax.rsqrt(square + self.epsilon), scale, bias)
        else:
            y = standardize_channels(self, x, scale, bias, center=False)
        return y.astype(output_dtype(self, x))
