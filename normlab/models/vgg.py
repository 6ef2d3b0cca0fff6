"""VGG nets. Simonyan & Zisserman 2015, arXiv:1409.1556, table 1: configurations A, B, D and E.

3×3 convolutions in five groups, a 2×2 max pooling behind each. By default the form for small
images, with global average and a linear head alone, on which batch normalization is studied
(Santurkar et al. 2018, arXiv:1805.11604; K. Liu's pytorch-cifar): at 32×32 pixels the last map has
one position, so the average is that position. With `hidden_width=4096` it is the paper's net
and torchvision's: two dense layers on the flattened map, 7×7×512 at 224×224 pixels, each with its
activation and dropout.

A normalizer stands behind each convolution and before its activation, as torchvision's
`vgg*_bn` have it, whose convolutions keep a bias beside it; here they go without one where the
normalizer has its own. The dense layers have none. Departures: weights of convolutions and dense
layers are He-initialized (the paper starts from a trained shallower net), and the dropout of the
dense layers is 0 by default (the paper's is 0.5). A pooling of a map with one row or column is left
out, so that images of less than 32×32 pixels go through.
"""

from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from normlab.models.activations import relu
from normlab.models.conv import StandardConv, he_normal, linear_norm
from normlab.models.drop import dropout
from normlab.norms import NormFactory

GROUP_WIDTHS = (64, 128, 256, 512, 512)
"""Channels of the five groups."""


class VGG11(nn.Module):
    """VGG-11 (A): 9,225,610 parameters for CIFAR-10 without norm, 9,228,362 with batch norm.

    As published, with 4096 hidden units, 1,000 classes and no normalizer: 132,863,336.
    """

    num_classes: int
    norm: NormFactory
    conv: StandardConv
    hidden_width: int = 0  # units of two dense layers before the head; 0: no such; paper: 4096
    dropout: float = 0.0  # of those layers' outputs in training; paper: 0.5
    activation: Callable[[Array], Array] = relu  # of all layers
    dtype: DTypeLike = "float32"  # of computation; parameters and logits are float32

    group_sizes: ClassVar[tuple[int, ...]] = (1, 1, 2, 2, 2)
    """Convolutions in each group."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, H, W, C], mask [N] -> logits float32 [N, num_classes]."""
        x = x.astype(self.dtype)
        number = 0
        for width, layers in zip(GROUP_WIDTHS, self.group_sizes, strict=True):
            for _ in range(layers):
                number += 1
                layer = self.conv.conv(
                    width,
                    3,
                    use_bias=not self.norm.has_bias,
                    dtype=self.dtype,
                    name=f"conv{number}",
                )
                act = self.norm.norm_act(name=f"norm{number}", activation=self.activation)
                x = linear_norm(layer, act, x, train=train, mask=mask)
            if min(x.shape[1:3]) > 1:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        if not self.hidden_width:
            x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
            return self.conv.head(self.num_classes, name="head")(x)
        x = x.reshape(x.shape[0], -1)
        for name in ("dense1", "dense2"):
            layer = self.conv.dense(
                self.hidden_width, dtype=self.dtype, kernel_init=he_normal, name=name
            )
            x, axis_name = self.activation(layer(x)), self.norm.axis_name
            x = dropout(self, x, self.dropout, train=train, axis_name=axis_name)
        return self.conv.head(self.num_classes, name="head")(x.astype(jnp.float32))


class VGG13(VGG11):
    """VGG-13 (B): 9,410,122 parameters for CIFAR-10 without norm, 9,413,066 with batch norm.

    As published, with 4096 hidden units, 1,000 classes and no normalizer: 133,047,848.
    """

    group_sizes = (2, 2, 2, 2, 2)


class VGG16(VGG11):
    """VGG-16 (D): 14,719,818 parameters for CIFAR-10 without norm, 14,724,042 with batch norm.

    As published, with 4096 hidden units, 1,000 classes and no normalizer: 138,357,544.
    """

    group_sizes = (2, 2, 3, 3, 3)


class VGG19(VGG11):
    """VGG-19 (E): 20,029,514 parameters for CIFAR-10 without norm, 20,035,018 with batch norm.

    As published, with 4096 hidden units, 1,000 classes and no normalizer: 143,667,240.
    """

    group_sizes = (2, 2, 4, 4, 4)
