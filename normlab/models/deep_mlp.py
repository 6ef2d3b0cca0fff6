"""Deep multilayer perceptron of one width, for the mean field theory of signals and gradients.

Yang et al. 2019, arXiv:1902.08129: x ← φ(norm(W x)) layer after layer, at initialization. With
batch normalization gradients explode with depth whatever φ is; `activation=identity` gives the
linear net, `relu` and `tanh` the two others that the theory is mostly told of.

He: N(0, 2 / fan-in), which keeps a ReLU's signal without a normalizer. LeCun: N(0, 1 / fan-in), for
a linear net. Orthogonal: uniform over the orthogonal matrices (Saxe et al. 2014, arXiv:1312.6120),
entries of variance 1 / fan-in. Behind a normalizer that divides by the batch's deviation the first
two are the same net. None of them is truncated, as the theory has it.
"""

from collections.abc import Callable

from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from normlab.errors import unknown
from normlab.models.activations import relu
from normlab.models.conv import StandardConv, he_normal, linear_norm
from normlab.norms import NormFactory
from normlab.norms.normalizer import Initializer

INITIALIZERS: dict[str, Initializer] = {
    "he": he_normal,
    "lecun": nn.initializers.variance_scaling(1.0, "fan_in", "normal"),
    "orthogonal": nn.initializers.orthogonal(),
}
"""Initializers of the hidden layers' weights by config name."""


class DeepMLP(nn.Module):
    """`depth` dense layers of `width` units, each normalized before its activation; linear head."""

    num_classes: int
    norm: NormFactory
    conv: StandardConv
    depth: int = 24  # hidden layers
    width: int = 512  # units of each hidden layer
    weights: str = "he"  # start of the hidden layers': he, lecun, orthogonal
    activation: Callable[[Array], Array] = relu  # of the hidden layers; identity: a linear net
    dtype: DTypeLike = "float32"  # of computation; parameters and logits are float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ...], mask [N] -> logits float32 [N, num_classes]."""
        if self.weights not in INITIALIZERS:
            raise unknown("'model.weights'", self.weights, INITIALIZERS)
        x = x.reshape(x.shape[0], -1).astype(self.dtype)
        for i in range(1, self.depth + 1):
            layer = self.conv.dense(
                self.width,
                use_bias=not self.norm.has_bias,
                dtype=self.dtype,
                kernel_init=INITIALIZERS[self.weights],
                name=f"dense{i}",
            )
            act = self.norm.norm_act(name=f"norm{i}", activation=self.activation)
            x = linear_norm(layer, act, x, train=train, mask=mask)
        return self.conv.head(self.num_classes, name="head")(x)
