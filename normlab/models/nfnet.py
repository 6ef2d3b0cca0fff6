"""NFNets. Brock, De, Smith & Simonyan 2021, arXiv:2102.06171.

From deepmind-research/nfnets/nfnet.py: normalizer-free blocks (`preact.py`) of a 1×1 convolution,
two grouped 3×3 ones of 128 channels a group, the first with the stride, and a 1×1; half as wide
inside as the stream; gates on each branch (squeeze-excite, ratio 0.5); shortcuts that average
before their 1×1 convolution. The stem is four 3×3 convolutions, the first and the last with stride
2, and a 1×1 convolution doubles the channels before the last activation. F0 to F7 differ in depth,
(1, 2, 6, 3) times 1 to 8, and in the dropout before the head.

    variant                 F0   F1   F2   F3   F4   F5   F6   F7
    dropout                 0.2  0.3  0.4  0.4  0.5  0.5  0.5  0.5
    training, pixels        192  224  256  320  384  416  448  480
    test, pixels            256  320  352  416  512  544  576  608

F0 has 71,489,284 parameters with 1,000 classes, and each further variant 61,144,972 more. F7 is in
the released code and not in the paper's table. The rate of stochastic depth, 0.25, is the recipe's
(experiment_nfnets.py; the class has 0.1). The baseline of the paper's ablation has
`widths=(256,512,1024,2048)` and `second_conv=false`; `widths=(384,768,2048,2048)` are the released
code's F0+ to F7+.

DeepMind's published weights, and timm's dm_nfnet_*, belong to `gain=released`.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar

from flax import linen as nn
from jax import Array

from normlab.models.nf_resnet import NORMALIZER_FREE
from normlab.models.preact import Layer, PreActNet, Style, check_widths, grouped


class NFNetF0(PreActNet):
    """NFNet-F0: 71,489,284 parameters with 1,000 classes."""

    stage_sizes: tuple[int, ...] = (1, 2, 6, 3)  # blocks in each stage
    widths: tuple[int, ...] = (256, 512, 1536, 1536)  # channels of the stream in each stage
    expansion: float = 0.5  # channels inside a branch, over those of the stream behind it
    group_width: int = 128  # channels of a group of the 3×3 convolutions
    second_conv: bool = True  # a second 3×3 convolution in each branch
    final_expansion: float = 2.0  # channels before the last activation, over those of the stream
    alpha: float = 0.2  # weight of each residual branch
    beta: str = "behind"  # 1/β of the stream multiplies: behind (the activation), before, none
    skip_gain: float | None = 0.0  # start of a learned scalar on each branch
    gain: str = "exact"  # γ on activations: exact (quadrature), released (Monte Carlo), none
    squeeze_excite: float = 0.5  # hidden units of gates on a branch, over its channels; 0: none
    downsample: str = "pool"  # shortcut at a stride: conv (1×1 with it), pool (average, then 1×1)
    padding: str = "same"  # symmetric, or same: XLA's, one-sided at a stride
    stochastic_depth: float = 0.25  # rate of dropping a branch, from 0 at the first up to this
    dropout: float = 0.2  # rate before the head
    activation: Callable[[Array], Array] = nn.gelu  # of all blocks

    default_choices: ClassVar[Mapping[str, str]] = NORMALIZER_FREE

    def blocks(self) -> tuple[int, ...]:
        """Returns the number of blocks of each stage; raises UserError unless each has a width."""
        check_widths(self.widths, self.stage_sizes)
        return self.stage_sizes

    def stem(self, x: Array, style: Style) -> Array:
        """x [N, H, W, C] -> [N, H / 4, W / 4, half of the first stage's width]."""
        layers = Layer(16, 3, 2), Layer(32, 3), Layer(64, 3), Layer(self.widths[0] // 2, 3, 2)
        for number, layer in enumerate(layers, 1):
            x = style.activation(x) if number > 1 else x
            x = style.layer(layer, f"conv_stem{number}")(x)
        return x

    def branch(self, channels: int, stage: int, block: int) -> tuple[Layer, ...]:
        """Returns 1×1, one or two grouped 3×3, and 1×1."""
        out, strides = self.widths[stage], 2 if stage > 0 and block == 0 else 1
        width, groups = grouped(out * self.expansion, self.group_width)
        second = (Layer(width, 3, groups=groups),) if self.second_conv else ()
        return Layer(width), Layer(width, 3, strides, groups), *second, Layer(out)

    def final_features(self, channels: int) -> int:
        """Returns the width of the 1×1 convolution before the last activation."""
        return int(channels * self.final_expansion)


class NFNetF1(NFNetF0):
    """NFNet-F1: 132,634,256 parameters with 1,000 classes."""

    stage_sizes: tuple[int, ...] = (2, 4, 12, 6)  # blocks in each stage
    dropout: float = 0.3  # rate before the head


class NFNetF2(NFNetF0):
    """NFNet-F2: 193,779,228 parameters with 1,000 classes."""

    stage_sizes: tuple[int, ...] = (3, 6, 18, 9)  # blocks in each stage
    dropout: float = 0.4  # rate before the head


class NFNetF3(NFNetF0):
    """NFNet-F3: 254,924,200 parameters with 1,000 classes."""

    stage_sizes: tuple[int, ...] = (4, 8, 24, 12)  # blocks in each stage
    dropout: float = 0.4  # rate before the head


class NFNetF4(NFNetF0):
    """NFNet-F4: 316,069,172 parameters with 1,000 classes."""

    stage_sizes: tuple[int, ...] = (5, 10, 30, 15)  # blocks in each stage
    dropout: float = 0.5  # rate before the head


class NFNetF5(NFNetF4):
    """NFNet-F5: 377,214,144 parameters with 1,000 classes."""

    stage_sizes: tuple[int, ...] = (6, 12, 36, 18)  # blocks in each stage


class NFNetF6(NFNetF4):
    """NFNet-F6: 438,359,116 parameters with 1,000 classes."""

    stage_sizes: tuple[int, ...] = (7, 14, 42, 21)  # blocks in each stage


class NFNetF7(NFNetF4):
    """NFNet-F7: 499,504,088 parameters with 1,000 classes."""

    stage_sizes: tuple[int, ...] = (8, 16, 48, 24)  # blocks in each stage
