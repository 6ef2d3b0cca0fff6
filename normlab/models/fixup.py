"""Residual nets without normalization by Fixup. Zhang, Dauphin & Ma 2019, arXiv:1901.09321.

The nets of `resnet_cifar.py` and `resnet.py` with three rules in place of normalizers (section 3):

1. the classifier and the last convolution of each residual branch start at 0;
2. the others of a branch start as He et al. have it, times L^(−1/(2m − 2)), with L the number of
   blocks and m that of a branch's convolutions: so one step of gradient descent changes the logits
   by as much as the learning rate, however deep the net;
3. a scalar bias, from 0, before each convolution, activation and the classifier, and a scalar
   multiplier, from 1, for each branch.

So at the start each block is the identity on what its predecessor's ReLU gave it, and the logits
are 0. As in the authors' code (hongyi-zhang/Fixup) the first bias of a block that changes the shape
is added to what its shortcut takes, too; on CIFAR that shortcut is every second pixel (their 1×1
average pooling with a stride) with zero channels behind, on ImageNet a 1×1 convolution.

Departures: He's deviation is that of the fan-in, as in this package's other nets (theirs: fan-out;
they differ in convolutions that change the number of channels alone), and for the stem too
(theirs: PyTorch's default). Scalars have the shape [] and not [1]. The rules are about plain
kernels: where `config.conv` normalizes weights, a factor on their start does nothing, and weight
norm's zeros, which have no direction, never move. A normalizer, if one is chosen, stands behind
each convolution.
"""

import math
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from normlab.models.activations import relu
from normlab.models.conv import StandardConv, he_normal, linear_norm
from normlab.models.remat import call_block
from normlab.models.resnet_cifar import pad_channels
from normlab.models.signals import sow_signals
from normlab.norms import NormFactory
from normlab.norms.normalizer import Initializer

zeros = nn.initializers.zeros


def scaled_he(factor: float) -> Initializer:
    """Returns the initializer of N(0, factor²·2 / fan-in)."""
    return nn.initializers.variance_scaling(2.0 * factor**2, "fan_in", "normal")


class FixupBlock(nn.Module):
    """y = act(x' + multiplier·branch + bias), x' the shortcut of x: rule 2 and rule 3."""

    layers: tuple[tuple[int, int, int], ...]  # (features, kernel size, stride) of each convolution
    num_blocks: int  # of the net: L
    project: bool  # by a 1×1 convolution where the shape changes; else zero channels
    norm: NormFactory
    conv: StandardConv
    activation: Callable[[Array], Array]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, H, W, C] -> [N, H / stride, W / stride, features of the last layer]."""

        def conv(layer: tuple[int, int, int], init: Initializer, name: str) -> nn.Module:
            features, size, strides = layer
            return self.conv.conv(
                features, size, strides=strides, dtype=self.dtype, kernel_init=init, name=name
            )

        m = len(self.layers)
        init = scaled_he(self.num_blocks ** (-1 / (2 * m - 2)))
        residual, y = x, x + scalar(self, "bias1a", 0.0)
        entry = y
        for i, layer in enumerate(self.layers[:-1], 1):
            if i > 1:
                y = y + scalar(self, f"bias{i}a", 0.0)
            act = self.norm.norm_act(
                name=f"norm{i}",
                activation=shifted(self.activation, scalar(self, f"bias{i}b", 0.0)),
            )
            y = linear_norm(conv(layer, init, f"conv{i}"), act, y, train=train, mask=mask)
        y = y + scalar(self, f"bias{m}a", 0.0)
        last = conv(self.layers[-1], zeros, f"conv{m}")
        end = linear_norm(last, self.norm(name=f"norm{m}"), y, train=train, mask=mask)
        y = end * scalar(self, "multiplier", 1.0) + scalar(self, f"bias{m}b", 0.0)
        if residual.shape != y.shape:
            features, step = y.shape[-1], math.prod(strides for _, _, strides in self.layers)
            if self.project:
                projection = conv((features, 1, step), he_normal, "conv_shortcut")
                norm = self.norm(name="norm_shortcut")
                residual = linear_norm(projection, norm, entry, train=train, mask=mask)
            else:
                residual = pad_channels(entry[:, ::step, ::step], features)
        out = self.activation(residual + y)
        sow_signals(self, branch=end, stream=out)
        return out


def scalar(module: nn.Module, name: str, start: float) -> Array:
    """Returns the module's parameter `name`, of shape [], in the module's dtype."""
    value: Array = module.param(name, nn.initializers.constant(start), ())
    return value.astype(module.dtype)


def shifted(activation: Callable[[Array], Array], bias: Array) -> Callable[[Array], Array]:
    """Returns x -> activation(x + bias)."""
    return lambda x: activation(x + bias)


class FixupResNet20(nn.Module):
    """Fixup ResNet-20 for 32×32 images: 268,393 parameters on CIFAR-10."""

    num_classes: int
    norm: NormFactory
    conv: StandardConv
    stage_sizes: tuple[int, ...] = (3, 3, 3)  # blocks in each stage
    width: int = 16  # channels of the first stage; doubled at each further one
    activation: Callable[[Array], Array] = relu  # of all blocks
    dtype: DTypeLike = "float32"  # of computation; parameters and logits are float32
    remat: bool = False  # keep the inputs of blocks alone, in training

    default_choices: ClassVar[dict[str, str]] = {"norm": "none"}
    bottleneck: ClassVar[bool] = False
    """Bottleneck blocks and projections, behind a stem for images of 224×224 pixels."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, H, W, C], mask [N] -> logits float32 [N, num_classes]."""
        size, strides = (7, 2) if self.bottleneck else (3, 1)
        stem = self.conv.conv(self.width, size, strides=strides, dtype=self.dtype, name="conv_stem")
        first = shifted(self.activation, scalar(self, "bias1", 0.0))
        act = self.norm.norm_act(name="norm_stem", activation=first)
        x = linear_norm(stem, act, x.astype(self.dtype), train=train, mask=mask)
        if self.bottleneck:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                residual = FixupBlock(
                    layers=self._layers(stage, 2 if stage > 0 and block == 0 else 1),
                    num_blocks=sum(self.stage_sizes),
                    project=self.bottleneck,
                    norm=self.norm,
                    conv=self.conv,
                    activation=self.activation,
                    dtype=self.dtype,
                    name=f"stage{stage + 1}_block{block + 1}",
                )
                x = call_block(residual, x, train=train, mask=mask, remat=self.remat)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        bias2 = self.param("bias2", zeros, ())
        return self.conv.head(self.num_classes, kernel_init=zeros, name="head")(x + bias2)

    def _layers(self, stage: int, strides: int) -> tuple[tuple[int, int, int], ...]:
        features = self.width * 2**stage
        if self.bottleneck:
            return ((features, 1, 1), (features, 3, strides), (4 * features, 1, 1))
        return ((features, 3, strides), (features, 3, 1))


class FixupResNet32(FixupResNet20):
    """Fixup ResNet-32 for 32×32 images: 461,959 parameters on CIFAR-10."""

    stage_sizes: tuple[int, ...] = (5, 5, 5)  # blocks in each stage


class FixupResNet56(FixupResNet20):
    """Fixup ResNet-56 for 32×32 images: 849,091 parameters on CIFAR-10."""

    stage_sizes: tuple[int, ...] = (9, 9, 9)  # blocks in each stage


class FixupResNet110(FixupResNet20):
    """Fixup ResNet-110 for 32×32 images: 1,720,138 parameters on CIFAR-10."""

    stage_sizes: tuple[int, ...] = (18, 18, 18)  # blocks in each stage


class FixupResNet50(FixupResNet20):
    """Fixup ResNet-50, stride in the 3×3 convolutions: 25,504,026 parameters with 1,000 classes."""

    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)  # blocks in each stage
    width: int = 64  # channels of the first stage; doubled at each further one

    bottleneck: ClassVar[bool] = True


class FixupResNet101(FixupResNet50):
    """Fixup ResNet-101: 44,444,049 parameters with 1,000 classes."""

    stage_sizes: tuple[int, ...] = (3, 4, 23, 3)  # blocks in each stage
