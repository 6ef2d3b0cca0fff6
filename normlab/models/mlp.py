"""Multilayer perceptron. Three layers of 100 sigmoids are the net of the Batch Normalization paper
(Ioffe & Szegedy 2015, section 4.1) on MNIST.
"""

from collections.abc import Callable

from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from normlab.models.conv import StandardConv, linear_norm
from normlab.norms import NormFactory


class MLP(nn.Module):
    """Dense layers, each normalized before its activation; images are flattened."""

    num_classes: int
    norm: NormFactory
    conv: StandardConv
    widths: tuple[int, ...] = (100, 100, 100)  # units of each hidden layer
    activation: Callable[[Array], Array] = nn.sigmoid  # of the hidden layers
    dtype: DTypeLike = "float32"  # of computation; parameters and logits are float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ...], mask [N] -> logits float32 [N, num_classes]."""
        x = x.reshape(x.shape[0], -1).astype(self.dtype)
        for i, width in enumerate(self.widths, 1):
            layer = self.conv.dense(
                width, use_bias=not self.norm.has_bias, dtype=self.dtype, name=f"dense{i}"
            )
            act = self.norm.norm_act(name=f"norm{i}", activation=self.activation)
            x = linear_norm(layer, act, x, train=train, mask=mask)
        return self.conv.head(self.num_classes, name="head")(x)
