"""ResNets for 32×32 images. He, Zhang, Ren & Sun 2016, arXiv:1512.03385, section 4.2.

6n + 2 layers: a 3×3 convolution, three stages of n basic blocks with 16, 32 and 64 channels, the
first convolution of stages two and three with stride 2, global average, linear head. Shortcut "A"
has no parameters (every second pixel, new channels zero); "B" projects with a normalized 1×1
convolution where the shape changes. The paper's CIFAR nets use "A".

`resnet18_cifar` is the ImageNet ResNet-18 with a 3×3 stem and no pooling (K. Liu's pytorch-cifar).
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from normlab.errors import UserError
from normlab.models.activations import relu
from normlab.models.conv import StandardConv, linear_norm
from normlab.models.remat import call_block
from normlab.models.signals import sow_signals
from normlab.norms import NormAct, Normalizer, NormFactory


class BasicBlock(nn.Module):
    """y = act(x' + norm(conv(act(norm(conv(x)))))), x' the shortcut of x."""

    features: int
    strides: int
    norm: NormFactory
    conv: StandardConv
    activation: Callable[[Array], Array]
    shortcut: str
    zero_init_scale: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, H, W, C] -> [N, H / strides, W / strides, features]."""
        use_bias = not self.norm.has_bias
        residual = x

        def conv(size: int, strides: int, name: str) -> nn.Module:
            return self.conv.conv(
                self.features, size, strides=strides, use_bias=use_bias, dtype=self.dtype, name=name
            )

        def after(layer: nn.Module, norm: Normalizer | NormAct, x: Array) -> Array:
            return linear_norm(layer, norm, x, train=train, mask=mask)

        act = self.norm.norm_act(name="norm1", activation=self.activation)
        x = after(conv(3, self.strides, "conv1"), act, x)
        last = nn.initializers.zeros if self.zero_init_scale else None
        x = after(conv(3, 1, "conv2"), self.norm(name="norm2", scale_init=last), x)
        if residual.shape != x.shape:
            if self.shortcut == "A":
                residual = pad_channels(residual[:, :: self.strides, :: self.strides], x.shape[-1])
            else:
                shortcut = conv(1, self.strides, "conv_shortcut")
                residual = after(shortcut, self.norm(name="norm_shortcut"), residual)
        out = self.activation(residual + x)
        sow_signals(self, branch=x, stream=out)
        return out


def pad_channels(x: Array, channels: int) -> Array:
    """Returns x [N, H, W, C] with zero channels behind its own: option A of He et al."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, channels - x.shape[-1])))


class ResNet20(nn.Module):
    """ResNet-20 for 32×32 images: 269,722 parameters with batch norm and shortcut A."""

    num_classes: int
    norm: NormFactory
    conv: StandardConv
    stage_sizes: tuple[int, ...] = (3, 3, 3)  # blocks in each stage
    width: int = 16  # channels of the first stage; doubled at each further one
    shortcut: str = "A"  # where the shape changes: A (zero channels) or B (1×1 projection)
    zero_init_scale: bool = False  # start the last norm of each block with scale zero
    activation: Callable[[Array], Array] = relu  # of all blocks
    dtype: DTypeLike = "float32"  # of computation; parameters and logits are float32
    remat: bool = False  # keep the inputs of blocks alone, in training

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, H, W, C], mask [N] -> logits float32 [N, num_classes]."""
        if self.shortcut not in ("A", "B"):
            raise UserError(f"config field 'model.shortcut' = {self.shortcut!r} is neither A nor B")
        stem = self.conv.conv(
            self.width, 3, use_bias=not self.norm.has_bias, dtype=self.dtype, name="conv_stem"
        )
        act = self.norm.norm_act(name="norm_stem", activation=self.activation)
        x = linear_norm(stem, act, x.astype(self.dtype), train=train, mask=mask)
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                residual = BasicBlock(
                    features=self.width * 2**stage,
                    strides=2 if stage > 0 and block == 0 else 1,
                    norm=self.norm,
                    conv=self.conv,
                    activation=self.activation,
                    shortcut=self.shortcut,
                    zero_init_scale=self.zero_init_scale,
                    dtype=self.dtype,
                    name=f"stage{stage + 1}_block{block + 1}",
                )
                x = call_block(residual, x, train=train, mask=mask, remat=self.remat)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return self.conv.head(self.num_classes, name="head")(x)


class ResNet32(ResNet20):
    """ResNet-32 for 32×32 images: 464,154 parameters with batch norm and shortcut A."""

    stage_sizes: tuple[int, ...] = (5, 5, 5)  # blocks in each stage


class ResNet44(ResNet20):
    """ResNet-44 for 32×32 images: 658,586 parameters with batch norm and shortcut A."""

    stage_sizes: tuple[int, ...] = (7, 7, 7)  # blocks in each stage


class ResNet56(ResNet20):
    """ResNet-56 for 32×32 images: 853,018 parameters with batch norm and shortcut A."""

    stage_sizes: tuple[int, ...] = (9, 9, 9)  # blocks in each stage


class ResNet110(ResNet20):
    """ResNet-110 for 32×32 images: 1,727,962 parameters with batch norm and shortcut A."""

    stage_sizes: tuple[int, ...] = (18, 18, 18)  # blocks in each stage


class ResNet18Cifar(ResNet20):
    """ResNet-18 with a 3×3 stem for 32×32 images: 11,173,962 parameters with batch norm."""

    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)  # blocks in each stage
    width: int = 64  # channels of the first stage; doubled at each further one
    shortcut: str = "B"  # where the shape changes: A (zero channels) or B (1×1 projection)
