"""ResNets for ImageNet sizes, v1.5. He, Zhang, Ren & Sun 2016, arXiv:1512.03385, table 1.

"v1.5": the stride of a bottleneck is in its 3×3 convolution, not in the first 1×1 (the change made
by the Torch reimplementation; about half a percent better). Zero initialization of the last scale
of each block is that of Goyal et al. 2017 (arXiv:1706.02677, section 5.1), whose recipe is the
usual one for ResNet-50, and therefore on by default.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from normlab.models.activations import relu
from normlab.models.conv import StandardConv, linear_norm
from normlab.models.remat import call_block
from normlab.models.resnet_cifar import BasicBlock
from normlab.models.signals import sow_signals
from normlab.norms import NormAct, Normalizer, NormFactory


class BottleneckBlock(nn.Module):
    """1×1, 3×3 and 1×1 convolutions, the last one four times as wide; projection shortcut."""

    features: int
    strides: int
    norm: NormFactory
    conv: StandardConv
    activation: Callable[[Array], Array]
    zero_init_scale: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, H, W, C] -> [N, H / strides, W / strides, 4·features]."""
        use_bias = not self.norm.has_bias
        residual = x

        def conv(features: int, size: int, strides: int, name: str) -> nn.Module:
            return self.conv.conv(
                features, size, strides=strides, use_bias=use_bias, dtype=self.dtype, name=name
            )

        def after(layer: nn.Module, norm: Normalizer | NormAct, x: Array) -> Array:
            return linear_norm(layer, norm, x, train=train, mask=mask)

        act1 = self.norm.norm_act(name="norm1", activation=self.activation)
        x = after(conv(self.features, 1, 1, "conv1"), act1, x)
        act2 = self.norm.norm_act(name="norm2", activation=self.activation)
        x = after(conv(self.features, 3, self.strides, "conv2"), act2, x)
        last = nn.initializers.zeros if self.zero_init_scale else None
        norm3 = self.norm(name="norm3", scale_init=last)
        x = after(conv(4 * self.features, 1, 1, "conv3"), norm3, x)
        if residual.shape != x.shape:
            shortcut = conv(4 * self.features, 1, self.strides, "conv_shortcut")
            residual = after(shortcut, self.norm(name="norm_shortcut"), residual)
        out = self.activation(residual + x)
        sow_signals(self, branch=x, stream=out)
        return out


class ResNet18(nn.Module):
    """ResNet-18 for 224×224 images: 11,689,512 parameters with batch norm and 1,000 classes."""

    num_classes: int
    norm: NormFactory
    conv: StandardConv
    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)  # blocks in each stage
    width: int = 64  # channels of the first stage; doubled at each further one
    zero_init_scale: bool = True  # start the last norm of each block with scale zero
    activation: Callable[[Array], Array] = relu  # of all blocks
    dtype: DTypeLike = "float32"  # of computation; parameters and logits are float32
    remat: bool = False  # keep the inputs of blocks alone, in training

    bottleneck: ClassVar[bool] = False

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, H, W, C], mask [N] -> logits float32 [N, num_classes]."""
        stem = self.conv.conv(
            self.width,
            7,
            strides=2,
            use_bias=not self.norm.has_bias,
            dtype=self.dtype,
            name="conv_stem",
        )
        act = self.norm.norm_act(name="norm_stem", activation=self.activation)
        x = linear_norm(stem, act, x.astype(self.dtype), train=train, mask=mask)
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                features = self.width * 2**stage
                strides = 2 if stage > 0 and block == 0 else 1
                name = f"stage{stage + 1}_block{block + 1}"
                residual = self._block(features, strides, name)
                x = call_block(residual, x, train=train, mask=mask, remat=self.remat)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return self.conv.head(self.num_classes, name="head")(x)

    def _block(self, features: int, strides: int, name: str) -> nn.Module:
        common: dict[str, Any] = {
            "features": features,
            "strides": strides,
            "norm": self.norm,
            "conv": self.conv,
            "activation": self.activation,
            "zero_init_scale": self.zero_init_scale,
            "dtype": self.dtype,
            "name": name,
        }
        return BottleneckBlock(**common) if self.bottleneck else BasicBlock(**common, shortcut="B")


class ResNet34(ResNet18):
    """ResNet-34 for 224×224 images: 21,797,672 parameters with batch norm and 1,000 classes."""

    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)  # blocks in each stage


class ResNet50(ResNet18):
    """ResNet-50 v1.5: 25,557,032 parameters with batch norm and 1,000 classes."""

    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)  # blocks in each stage

    bottleneck: ClassVar[bool] = True


class ResNet101(ResNet50):
    """ResNet-101 v1.5: 44,549,160 parameters with batch norm and 1,000 classes."""

    stage_sizes: tuple[int, ...] = (3, 4, 23, 3)  # blocks in each stage


class ResNet152(ResNet50):
    """ResNet-152 v1.5: 60,192,808 parameters with batch norm and 1,000 classes."""

    stage_sizes: tuple[int, ...] = (3, 8, 36, 3)  # blocks in each stage
