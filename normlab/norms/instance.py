"""Instance Normalization. Ulyanov, Vedaldi & Lempitsky 2016, arXiv:1607.08022.

Mean and variance per example and channel over H and W, the same in training and at inference. On a
single position the output is the bias alone. PyTorch's module has no gain and offset by default;
here both are on, as for the other normalizers.
"""

from typing import ClassVar

from flax import linen as nn
from jax import Array

from normlab.norms.examples import normalize_groups, prepare
from normlab.norms.normalizer import (
    AffineNormalizer,
    Facts,
    output_dtype,
    scale_and_bias,
)


class InstanceNorm(AffineNormalizer):
    """Normalizes each channel of each example over its positions. No state."""

    epsilon: float = 1e-5  # added to the variance, inside the root

    facts: ClassVar[Facts] = Facts(
        over="H W",
        passes=(2, 3),
        equals=(
            "group_norm: num_groups C",
            "batch_norm in training: a batch of one",
        ),
    )

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C].

        An example with nothing unmasked is normalized by its own values.
        """
        scale, bias = scale_and_bias(self, x.shape[-1:])
        x, mask = prepare(x, mask)
        y = normalize_groups(self, x, x.shape[-1], mask, scale, bias)
        return y.astype(output_dtype(self, x))
