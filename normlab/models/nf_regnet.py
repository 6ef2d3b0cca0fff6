"""NF-RegNets. Brock, De & Smith 2021, arXiv:2101.08692.

From deepmind-research/nfnets/nf_regnet.py and base.py: normalizer-free blocks (`preact.py`) of a
1×1 convolution, a grouped 3×3 one of 8 channels a group, and a 1×1. A branch is 2.25 times as wide
as the stream *before* it (the very first as wide), its gates stand before the last activation,
shortcuts average before their 1×1 convolution, and each of the four stages has stride 2, as has the
3×3 stem. A 1×1 convolution to 1280/440 of the last stage's width stands before the last activation.

    variant                 B0   B1   B2   B3   B4   B5
    dropout                 0.2  0.2  0.3  0.3  0.4  0.4
    training, pixels        192  224  240  288  320  384
    test, pixels            224  256  272  320  384  456

Parameters are counted by the released code. The paper's table could not be had to check them (as
remembered it has 8.3M for B0, where the released definition has 8.60M).

The released widths are multiplied by a factor of 0.75; here they stand as products. The head starts
at zero. The released class asks for the activation `swish`, which its own table does not have; silu
is meant (experiment_nf_regnets.py names it so). With `conv=weight_norm` give `head_deviation` a
value: weights of zero have no direction, and their gradient is zero.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar

from flax import linen as nn
from jax import Array

from normlab.models.nf_resnet import NORMALIZER_FREE
from normlab.models.preact import Layer, PreActNet, Style, check_widths, grouped


class NFRegNetB0(PreActNet):
    """NF-RegNet-B0: 8,595,372 parameters with 1,000 classes."""

    stage_sizes: tuple[int, ...] = (1, 3, 6, 6)  # blocks in each stage
    widths: tuple[int, ...] = (36, 78, 156, 330)  # channels of the stream in each stage
    expansion: float = 2.25  # channels inside a branch, over those of the stream before it
    group_width: int = 8  # channels of a group of the 3×3 convolutions
    alpha: float = 0.2  # weight of each residual branch
    beta: str = "behind"  # 1/β of the stream multiplies: behind (the activation), before, none
    skip_gain: float | None = 0.0  # start of a learned scalar on each branch
    gain: str = "exact"  # γ on activations: exact (quadrature), released (Monte Carlo), none
    squeeze_excite: float = 0.5  # hidden units of gates on a branch, over its channels; 0: none
    downsample: str = "pool"  # shortcut at a stride: conv (1×1 with it), pool (average, then 1×1)
    padding: str = "same"  # symmetric, or same: XLA's, one-sided at a stride
    stochastic_depth: float = 0.1  # rate of dropping a branch, from 0 at the first up to this
    dropout: float = 0.2  # rate before the head
    head_deviation: float = 0.0  # standard deviation of the head's initial weights
    activation: Callable[[Array], Array] = nn.silu  # of all blocks

    default_choices: ClassVar[Mapping[str, str]] = NORMALIZER_FREE
    excite_before_last: ClassVar[bool] = True

    def blocks(self) -> tuple[int, ...]:
        """Returns the number of blocks of each stage; raises UserError unless each has a width."""
        check_widths(self.widths, self.stage_sizes)
        return self.stage_sizes

    def stem(self, x: Array, style: Style) -> Array:
        """x [N, H, W, C] -> [N, H / 2, W / 2, the first stage's width]."""
        return style.layer(Layer(self.widths[0], 3, 2), "conv_stem")(x)

    def branch(self, channels: int, stage: int, block: int) -> tuple[Layer, ...]:
        """Returns 1×1, grouped 3×3, and 1×1."""
        expansion = 1.0 if stage == 0 and block == 0 else self.expansion
        width, groups = grouped(channels * expansion, self.group_width)
        strides = 2 if block == 0 else 1
        return Layer(width), Layer(width, 3, strides, groups), Layer(self.widths[stage])

    def final_features(self, channels: int) -> int:
        """Returns the width of the 1×1 convolution before the last activation."""
        return 1280 * channels // 440


class NFRegNetB1(NFRegNetB0):
    """NF-RegNet-B1: 10,019,208 parameters with 1,000 classes."""

    stage_sizes: tuple[int, ...] = (2, 4, 7, 7)  # blocks in each stage


class NFRegNetB2(NFRegNetB0):
    """NF-RegNet-B2: 13,785,904 parameters with 1,000 classes."""

    stage_sizes: tuple[int, ...] = (2, 4, 8, 8)  # blocks in each stage
    widths: tuple[int, ...] = (42, 84, 174, 366)  # channels of the stream in each stage
    dropout: float = 0.3  # rate before the head


class NFRegNetB3(NFRegNetB2):
    """NF-RegNet-B3: 18,136,667 parameters with 1,000 classes."""

    stage_sizes: tuple[int, ...] = (2, 5, 9, 9)  # blocks in each stage
    widths: tuple[int, ...] = (42, 96, 186, 396)  # channels of the stream in each stage


class NFRegNetB4(NFRegNetB0):
    """NF-RegNet-B4: 29,315,830 parameters with 1,000 classes."""

    stage_sizes: tuple[int, ...] = (2, 6, 11, 11)  # blocks in each stage
    widths: tuple[int, ...] = (48, 108, 216, 462)  # channels of the stream in each stage
    dropout: float = 0.4  # rate before the head


class NFRegNetB5(NFRegNetB4):
    """NF-RegNet-B5: 48,707,138 parameters with 1,000 classes."""

    stage_sizes: tuple[int, ...] = (3, 7, 14, 14)  # blocks in each stage
    widths: tuple[int, ...] = (60, 126, 252, 528)  # channels of the stream in each stage
