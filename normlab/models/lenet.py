"""LeNet-5 with a normalizer after each hidden layer, as in *Dive into Deep Learning*, section 8.5.

Sigmoids, average pooling, and biases kept beside the normalizer's own: with batch normalization
44,878 parameters on 28×28×1 (156 + 12 + 2,416 + 32 + 30,840 + 240 + 10,164 + 168 + 850).
"""

from collections.abc import Callable

from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from normlab.models.conv import StandardConv, linear_norm
from normlab.norms import NormFactory

SMALLEST_SIDE = 16
"""Pixels: 16 − 4 = 12, pooled 6, 6 − 4 = 2, pooled 1."""


class LeNet5(nn.Module):
    """Two 5×5 convolutions with pooling and two hidden dense layers."""

    num_classes: int
    norm: NormFactory
    conv: StandardConv
    activation: Callable[[Array], Array] = nn.sigmoid  # after each normalizer
    dtype: DTypeLike = "float32"  # of computation; parameters and logits are float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, H, W, C], at least 16×16, mask [N] -> logits float32 [N, num_classes].

        Raises ValueError for smaller images.
        """
        height, width = x.shape[1:3]
        if min(height, width) < SMALLEST_SIDE:
            raise ValueError(f"{height}×{width} pixels; the smallest side is {SMALLEST_SIDE}")

        def norm_act(layer: nn.Module, x: Array, number: int) -> Array:
            act = self.norm.norm_act(name=f"norm{number}", activation=self.activation)
            return linear_norm(layer, act, x, train=train, mask=mask)

        x = x.astype(self.dtype)
        for i, features in enumerate((6, 16), 1):
            layer = self.conv.conv(
                features, 5, padding=0, use_bias=True, dtype=self.dtype, name=f"conv{i}"
            )
            x = nn.avg_pool(norm_act(layer, x, i), (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate((120, 84), 1):
            layer = self.conv.dense(width, dtype=self.dtype, name=f"dense{i}")
            x = norm_act(layer, x, i + 2)
        return self.conv.head(self.num_classes, name="head")(x)
