"""Pre-activation ResNets with normalizers, and NF-ResNets, which differ from them in choices alone.

`preact_resnet*`: He, Zhang, Ren & Sun 2016, arXiv:1603.05027. `nf_resnet*`: Brock, De & Smith 2021,
arXiv:2101.08692, from deepmind-research/nfnets/nf_resnet.py. `preact.py` has the definitions.

The sizes for 32×32 images have blocks of two 3×3 convolutions and the stem and widths of He et
al. 2016 (arXiv:1512.03385, section 4.2); there is no released NF net of that size, so their padding
is that of the nets with normalizers, and a pair `preact_resnet20`, `nf_resnet20` differs in the
normalizer and what comes with it. The ImageNet sizes have bottlenecks, a quarter as wide as the
stream, their stride in the 3×3. Their stem is a 7×7 convolution and a max pooling, with neither
normalizer nor activation in it. Stochastic depth and dropout are 0 here; the paper's regularized
nets have 0.1 and 0.25.

NF-ResNet-50 has the parameters of ResNet-50, since each gain and bias of a convolution takes the
place of a scale and offset of batch normalization, and a skip gain for each block.

From timm's nf_resnet*: `downsample=pool`, `padding=symmetric`, γ in the weights (`gain=none`).
"""

from collections.abc import Mapping
from typing import ClassVar

from flax import linen as nn
from flax.core import FrozenDict
from jax import Array

from normlab.models.preact import Layer, PreActNet, Style

NORMALIZER_FREE: Mapping[str, str] = FrozenDict(norm="none", conv="scaled_weight_standardization")
"""What a normalizer-free net goes with unless the user chooses."""


class PreActResNet20(PreActNet):
    """Pre-activation ResNet-20 for 32×32 images: 272,282 parameters with batch norm."""

    stage_sizes: tuple[int, ...] = (3, 3, 3)  # blocks in each stage
    width: int = 16  # channels of the first stage's 3×3 convolutions; doubled at each further one

    bottleneck: ClassVar[bool] = False

    def blocks(self) -> tuple[int, ...]:
        """Returns the number of blocks of each stage."""
        return self.stage_sizes

    def stem(self, x: Array, style: Style) -> Array:
        """x [N, H, W, C] -> [N, H, W, width], or [N, H / 4, W / 4, width] with bottlenecks."""
        if not self.bottleneck:
            return style.layer(Layer(self.width, 3), "conv_stem")(x)
        x = style.layer(Layer(self.width, 7, 2), "conv_stem")(x)
        padding = "SAME" if style.same_padding else ((1, 1), (1, 1))
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=padding)

    def branch(self, channels: int, stage: int, block: int) -> tuple[Layer, ...]:
        """Returns two 3×3 convolutions, or 1×1, 3×3 and 1×1 with a bottleneck."""
        width, strides = self.width * 2**stage, 2 if stage > 0 and block == 0 else 1
        if self.bottleneck:
            return Layer(width), Layer(width, 3, strides), Layer(4 * width)
        return Layer(width, 3, strides), Layer(width, 3)


class PreActResNet32(PreActResNet20):
    """Pre-activation ResNet-32 for 32×32 images: 466,714 parameters with batch norm."""

    stage_sizes: tuple[int, ...] = (5, 5, 5)  # blocks in each stage


class PreActResNet56(PreActResNet20):
    """Pre-activation ResNet-56 for 32×32 images: 855,578 parameters with batch norm."""

    stage_sizes: tuple[int, ...] = (9, 9, 9)  # blocks in each stage


class PreActResNet50(PreActResNet20):
    """Pre-activation ResNet-50: 25,549,352 parameters with batch norm and 1,000 classes."""

    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)  # blocks in each stage
    width: int = 64  # channels of the first stage's 3×3 convolutions; doubled at each further one

    bottleneck: ClassVar[bool] = True


class NFResNet20(PreActResNet20):
    """NF-ResNet-20 for 32×32 images: 272,483 parameters."""

    alpha: float = 0.2  # weight of each residual branch
    beta: str = "behind"  # 1/β of the stream multiplies: behind (the activation), before, none
    skip_gain: float | None = 0.0  # start of a learned scalar on each branch
    gain: str = "exact"  # γ on activations: exact (quadrature), released (Monte Carlo), none

    default_choices: ClassVar[Mapping[str, str]] = NORMALIZER_FREE


class NFResNet32(NFResNet20):
    """NF-ResNet-32 for 32×32 images: 466,921 parameters."""

    stage_sizes: tuple[int, ...] = (5, 5, 5)  # blocks in each stage


class NFResNet56(NFResNet20):
    """NF-ResNet-56 for 32×32 images: 855,797 parameters."""

    stage_sizes: tuple[int, ...] = (9, 9, 9)  # blocks in each stage


class NFResNet26(NFResNet20):
    """NF-ResNet-26 for 224×224 images: 15,995,184 parameters with 1,000 classes."""

    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)  # blocks in each stage
    width: int = 64  # channels of the first stage's 3×3 convolutions; doubled at each further one
    padding: str = "same"  # symmetric, or same: XLA's, one-sided at a stride

    bottleneck: ClassVar[bool] = True


class NFResNet50(NFResNet26):
    """NF-ResNet-50: 25,557,048 parameters with 1,000 classes."""

    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)  # blocks in each stage


class NFResNet101(NFResNet26):
    """NF-ResNet-101: 44,549,193 parameters with 1,000 classes."""

    stage_sizes: tuple[int, ...] = (3, 4, 23, 3)  # blocks in each stage


class NFResNet152(NFResNet26):
    """NF-ResNet-152: 60,192,858 parameters with 1,000 classes."""

    stage_sizes: tuple[int, ...] = (3, 8, 36, 3)  # blocks in each stage


class NFResNet200(NFResNet26):
    """NF-ResNet-200: 64,673,898 parameters with 1,000 classes."""

    stage_sizes: tuple[int, ...] = (3, 24, 36, 3)  # blocks in each stage


class NFResNet288(NFResNet26):
    """NF-ResNet-288: 146,460,552 parameters with 1,000 classes."""

    stage_sizes: tuple[int, ...] = (24, 24, 24, 24)  # blocks in each stage
