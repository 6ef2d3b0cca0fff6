"""Dynamic Tanh. Zhu, Chen, He, LeCun & Liu 2025, arXiv:2503.10622.

DyT(x) = γ tanh(αx) + β with one learned scalar α and γ, β per channel (algorithm 1). No statistics:
training and inference are the same, and no value touches another. Meant for the place of layer
normalization in transformers.

The official code starts α at 0.5, as here; for language models the paper scales it by width and
place, hence the field. tanh is taken in float32 at least.
"""

from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from normlab.norms.examples import prepare
from normlab.norms.functional import affine, statistics_dtype
from normlab.norms.normalizer import (
    AffineNormalizer,
    Facts,
    output_dtype,
    scale_and_bias,
)


class DynamicTanh(AffineNormalizer):
    """Squashes each value by tanh with a learned slope. No state, no statistics.

    Parameters: `alpha` [], `scale`, `bias` [C].
    """

    initial_alpha: float = 0.5  # slope at the start

    replaces_bias: ClassVar[bool] = False  # an offset behind the bend moves no threshold
    facts: ClassVar[Facts] = Facts(passes=(2, 3))

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C]. A mask makes no difference."""
        slope = nn.initializers.constant(self.initial_alpha)
        alpha = self.param("alpha", slope, (), self.param_dtype)
        scale, bias = scale_and_bias(self, x.shape[-1:])
        x, _ = prepare(x, mask)
        y = jnp.tanh(alpha * x.astype(statistics_dtype(x.dtype)))
        return affine(y, scale, bias).astype(output_dtype(self, x))
