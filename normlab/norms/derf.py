"""Derf, dynamic erf. Chen, Lu, Zhu, Sun & Liu 2025, arXiv:2512.10938.

Derf(x) = γ erf(αx + s) + β with learned scalars α and s and γ, β per channel. No statistics, as
dynamic tanh. The official code starts at α = 0.5, s = 0, as here; erf is taken in float32 at least.
"""

from typing import ClassVar

from flax import linen as nn
from jax import Array
from jax.scipy.special import erf

from normlab.norms.examples import prepare
from normlab.norms.functional import affine, statistics_dtype
from normlab.norms.normalizer import (
    AffineNormalizer,
    Facts,
    output_dtype,
    scale_and_bias,
)


class Derf(AffineNormalizer):
    """Squashes each value by erf with a learned slope and shift. No state, no statistics.

    Parameters: `alpha`, `shift` [], `scale`, `bias` [C].
    """

    initial_alpha: float = 0.5  # slope at the start

    replaces_bias: ClassVar[bool] = False  # an offset behind the bend moves no threshold
    facts: ClassVar[Facts] = Facts(passes=(2, 3))

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C]. A mask makes no difference."""
        slope = nn.initializers.constant(self.initial_alpha)
        alpha = self.param("alpha", slope, (), self.param_dtype)
        shift = self.param("shift", nn.initializers.zeros, (), self.param_dtype)
        scale, bias = scale_and_bias(self, x.shape[-1:])
        x, _ = prepare(x, mask)
        y = erf(alpha * x.astype(statistics_dtype(x.dtype)) + shift)
        return affine(y, scale, bias).astype(output_dtype(self, x))
