"""Wide residual networks for 32×32 images, WRN-d-k. Zagoruyko & Komodakis 2016, arXiv:1605.07146.

Depth d = 6n + 4: a 3×3 convolution of 16 channels, three stages of n pre-activation blocks
(`preact.py`) of two 3×3 convolutions with 16k, 32k and 64k channels. Dropout in a block stands
before its last convolution, behind the activation, as in their code. Departures: weights are drawn
by fan-in and the head as in `preact.py`.

`skipinit_resnet` (De & Smith 2020, arXiv:2002.10444) is the same network without normalizers, with
biases, and with each branch times a learned scalar that starts at 0: x + a·f(x). `skip_gain` is
a's start; the paper also has 1/√d for d blocks, and 1, with which only shallow nets train. Its
CIFAR nets are n-2 WRN of depth n, 16 to 1000.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from flax.core import FrozenDict
from jax import Array

from normlab.errors import UserError
from normlab.models.preact import Layer, PreActNet, Style


class WideResNet(PreActNet):
    """WRN-28-10: 36,479,194 parameters with batch norm on CIFAR-10."""

    depth: int = 28  # layers, 6n + 4 with n blocks in each of three stages
    widen_factor: int = 10  # k: the stages have 16k, 32k and 64k channels
    block_dropout: float = 0.0  # rate in each block, before the last convolution

    def blocks(self) -> tuple[int, ...]:
        """Returns n for each of three stages; raises UserError if the depth is not 6n + 4."""
        blocks = max(1, round((self.depth - 4) / 6))
        if self.depth != 6 * blocks + 4:
            raise UserError(
                f"config field 'model.depth' = {self.depth} is not 6n + 4; "
                f"nearest: {6 * blocks + 4}"
            )
        return (blocks,) * 3

    def stem(self, x: Array, style: Style) -> Array:
        """x [N, H, W, C] -> [N, H, W, 16]."""
        return style.layer(Layer(16, 3), "conv_stem")(x)

    def branch(self, channels: int, stage: int, block: int) -> tuple[Layer, ...]:
        """Returns two 3×3 convolutions."""
        width, strides = 16 * self.widen_factor * 2**stage, 2 if stage > 0 and block == 0 else 1
        return Layer(width, 3, strides), Layer(width, 3)

    def style(self) -> Style:
        """Returns what all layers have in common."""
        return dataclasses.replace(super().style(), branch_dropout=self.block_dropout)


class SkipInitResNet(WideResNet):
    """SkipInit on WRN-16-2: 690,992 parameters; each branch times a learned scalar."""

    depth: int = 16  # layers, 6n + 4 with n blocks in each of three stages
    widen_factor: int = 2  # k: the stages have 16k, 32k and 64k channels
    skip_gain: float | None = 0.0  # start of a learned scalar on each branch

    default_choices: ClassVar[Mapping[str, str]] = FrozenDict(norm="none")
