"""A small convolutional net for small images: seconds of training on one core."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from normlab.errors import UserError
from normlab.models.activations import relu
from normlab.models.conv import StandardConv, linear_norm
from normlab.norms import NormFactory


class CNN(nn.Module):
    """3×3 convolutions, each normalized before its activation; global average; linear head."""

    num_classes: int
    norm: NormFactory
    conv: StandardConv
    widths: tuple[int, ...] = (16, 16, 32, 32, 32)  # channels of each convolution
    strides: tuple[int, ...] = (1, 1, 2, 1, 2)  # stride of each convolution
    activation: Callable[[Array], Array] = relu  # after each normalizer
    dtype: DTypeLike = "float32"  # of computation; parameters and logits are float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, H, W, C], mask [N] -> logits float32 [N, num_classes]."""
        if len(self.widths) != len(self.strides):
            raise UserError(
                f"config field 'model.strides' = {self.strides} must be as long as "
                f"'model.widths' = {self.widths}"
            )
        x = x.astype(self.dtype)
        for i, (width, stride) in enumerate(zip(self.widths, self.strides, strict=True), 1):
            layer = self.conv.conv(
                width,
                3,
                strides=stride,
                use_bias=not self.norm.has_bias,
                dtype=self.dtype,
                name=f"conv{i}",
            )
            act = self.norm.norm_act(name=f"norm{i}", activation=self.activation)
            x = linear_norm(layer, act, x, train=train, mask=mask)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return self.conv.head(self.num_classes, name="head")(x)
