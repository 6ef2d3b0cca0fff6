"""Layer Normalization. Ba, Kiros & Hinton 2016, arXiv:1607.06450.

Mean and variance over the features of one example, the same in training and at inference. Two
meanings are in use, both here: over H, W and C (vision; the "LN" of the Group Normalization paper)
and over the last axis only (transformers; Flax's LayerNorm).

Departure: the paper has a gain and bias per element. Here they are per channel for both meanings,
as is usual for images; `elementwise=True` gives the paper's.
"""

from typing import ClassVar

from flax import linen as nn
from jax import Array

from normlab.norms.examples import (
    check_axes,
    normalize_groups,
    prepare,
    standardize_channels,
)
from normlab.norms.normalizer import (
    AffineNormalizer,
    Facts,
    output_dtype,
    scale_and_bias,
)


class LayerNorm(AffineNormalizer):
    """Normalizes each example (or position) over its own features. No state."""

    axes: str = "all"  # statistics over: all (H, W, C of an example) or channel (last axis)
    epsilon: float = 1e-5  # added to the variance, inside the root
    elementwise: bool = False  # a gain and offset per element instead of per channel

    facts: ClassVar[Facts] = Facts(
        over="H W C",
        passes=(2, 3),
        equals=(
            "group_norm: num_groups 1",
            "rms_norm: values of mean 0",
        ),
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
            y = normalize_groups(self, x, 1, mask, scale, bias)
        else:
            y = standardize_channels(self, x, scale, bias, center=True)
        return y.astype(output_dtype(self, x))
