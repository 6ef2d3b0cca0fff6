"""Residual networks of pre-activation blocks, with normalizers and without.

With normalizers it is He, Zhang, Ren & Sun 2016 (arXiv:1603.05027): normalizer and activation stand
before each convolution, and nothing touches the sums. Normalizer-free it is Brock, De & Smith 2021
(arXiv:2101.08692):

    h_{l+1} = h_l + α·s_l·f_l(h_l/β_l),    β_l = √Var(h_l),    Var(h_{l+1}) = Var(h_l) + α²,

so that each branch f sees variance 1 and, with convolutions of scaled weight standardization and
activations times their gain γ, has variance 1. s is a learned scalar (SkipInit, De & Smith 2020,
arXiv:2002.10444): 0 at the start as in the released code, 1 for the analysis of signals.

Where the shape changes the shortcut is a 1×1 convolution of the activated input (He et al., as in
their code), whose variance is 1 whatever came before: so β of that block is still the old one, and
the *next* block expects 1 + α².

As in the released code (deepmind-research/nfnets) and not as in the formula, 1/β multiplies behind
the activation unless `beta` says `before`; the two are equal for a relu without bias before it.

Stem and last convolutions of branches have a bias only where no normalizer has one. The head is
drawn from N(0, 0.01²), as DeepMind's, and as Goyal et al. 2017 (arXiv:1706.02677, section 5.1) have
it with batch normalization.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from normlab.errors import UserError, unknown
from normlab.models.activations import relu, scaled
from normlab.models.conv import StandardConv, linear_norm
from normlab.models.drop import drop_branch, dropout
from normlab.models.remat import call_block
from normlab.models.signals import sow_signals
from normlab.norms import NormFactory

BETAS = ("behind", "before", "none")
DOWNSAMPLINGS = ("conv", "pool")
PADDINGS = ("symmetric", "same")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A square convolution."""

    features: int
    size: int = 1
    strides: int = 1
    groups: int = 1


@dataclasses.dataclass(frozen=True)
class Style:
    """What all layers of a network have in common; the fields are those of `PreActNet`."""

    norm: NormFactory
    conv: StandardConv
    activation: Callable[[Array], Array]
    alpha: float
    beta: str
    skip_gain: float | None
    squeeze_excite: float
    excite_before_last: bool
    downsample: str
    same_padding: bool
    rescale_branches: bool
    branch_dropout: float
    dtype: DTypeLike

    def layer(self, layer: Layer, name: str) -> nn.Module:
        """Returns the convolution as a module."""
        return self.conv.conv(
            layer.features,
            layer.size,
            strides=layer.strides,
            padding="SAME" if self.same_padding else None,
            groups=layer.groups,
            use_bias=not self.norm.has_bias,
            dtype=self.dtype,
            name=name,
        )


class SqueezeExcite(nn.Module):
    """Gates on channels (Hu, Shen & Sun 2018, arXiv:1709.01507), times 2: at the start near 1.

    The factor is Brock et al.'s, who need branches of variance 1; the two layers are plain dense
    ones whatever the convolutions are, and the relu between them has no γ.
    """

    ratio: float  # hidden units, over channels
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [N, H, W, C] -> 2·sigmoid(W₂·relu(W₁·mean(x) + b₁) + b₂)·x."""
        channels = x.shape[-1]
        wide = jnp.promote_types(x.dtype, jnp.float32)
        pooled = jnp.mean(x, axis=(1, 2), dtype=wide).astype(x.dtype)
        squeeze = nn.Dense(max(1, int(channels * self.ratio)), dtype=self.dtype, name="squeeze")
        hidden = relu(squeeze(pooled))
        gates = nn.sigmoid(nn.Dense(channels, dtype=self.dtype, name="excite")(hidden))
        return 2 * gates[:, None, None, :] * x


class PreActBlock(nn.Module):
    """x + α·s·f(x/β), f a chain of convolutions with normalizer and activation before each."""

    layers: tuple[Layer, ...]
    deviation: float  # β: expected standard deviation of the stream
    drop_rate: float  # of the whole branch of an example
    style: Style

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, H, W, C] -> [N, H / strides, W / strides, features of the last layer]."""
        style, axis_name = self.style, self.style.norm.axis_name
        call: dict[str, Any] = {"train": train, "mask": mask}
        activated = self._first_activation(x, **call)
        y = activated
        for number, layer in enumerate(self.layers, 1):
            conv, left = style.layer(layer, f"conv{number}"), len(self.layers) - number
            if left == 0:
                y = conv(y)
                continue
            act = style.norm.norm_act(name=f"norm{number + 1}", activation=style.activation)
            if left == 1 and style.squeeze_excite and style.excite_before_last:
                y = act(self._gated(conv(y)), **call)
            else:
                y = linear_norm(conv, act, y, **call)
            if left == 1:
                y = dropout(self, y, style.branch_dropout, train=train, axis_name=axis_name)
        if style.squeeze_excite and not style.excite_before_last:
            y = self._gated(y)
        branch = y
        rescale = style.rescale_branches
        y = drop_branch(self, y, self.drop_rate, rescale=rescale, train=train, axis_name=axis_name)
        if style.skip_gain is not None:
            start = nn.initializers.constant(style.skip_gain)
            y = y * self.param("skip_gain", start, ()).astype(y.dtype)
        y = self._shortcut(x, activated) + style.alpha * y
        sow_signals(self, branch=branch, stream=y)
        return y

    def _first_activation(self, x: Array, **call: Any) -> Array:
        """Returns act(norm(x)), the stream's deviation divided out before it or behind it."""
        act = self.style.norm.norm_act(name="norm1", activation=self.style.activation)
        if self.style.beta == "none":
            return act(x, **call)
        if self.style.beta == "before":
            return act(x * (1 / self.deviation), **call)
        return act(x, **call) * (1 / self.deviation)

    def _shortcut(self, x: Array, activated: Array) -> Array:
        """Returns x, or where the shape changes a convolution of the activated x."""
        features = self.layers[-1].features
        strides = math.prod(layer.strides for layer in self.layers)
        if strides == 1 and x.shape[-1] == features:
            return x
        if self.style.downsample == "pool" and strides > 1:
            window = (strides, strides)
            activated = nn.avg_pool(
                activated, window, strides=window, padding="SAME", count_include_pad=False
            )
            strides = 1
        return self.style.layer(Layer(features, strides=strides), "conv_shortcut")(activated)

    def _gated(self, y: Array) -> Array:
        style = self.style
        return SqueezeExcite(style.squeeze_excite, style.dtype, name="squeeze_excite")(y)


class PreActNet(nn.Module):
    """Base of the networks: stem, stages of blocks, last activation, mean, head."""

    num_classes: int
    norm: NormFactory
    conv: StandardConv
    alpha: float = 1.0  # weight of each residual branch
    beta: str = "none"  # 1/β of the stream multiplies: behind (the activation), before, none
    skip_gain: float | None = None  # start of a learned scalar on each branch; none: no scalar
    gain: str = "none"  # γ on activations: exact (quadrature), released (Monte Carlo), none
    squeeze_excite: float = 0.0  # hidden units of gates on a branch, over its channels; 0: none
    downsample: str = "conv"  # shortcut at a stride: conv (1×1 with it), pool (average, then 1×1)
    padding: str = "symmetric"  # symmetric, or same: XLA's, one-sided at a stride
    stochastic_depth: float = 0.0  # rate of dropping a branch, from 0 at the first up to this
    rescale_branches: bool = False  # divide a branch that is not dropped by its chance to stay
    dropout: float = 0.0  # rate before the head
    head_deviation: float = 0.01  # standard deviation of the head's initial weights
    activation: Callable[[Array], Array] = relu  # of all blocks
    dtype: DTypeLike = "float32"  # of computation; parameters and logits are float32
    remat: bool = False  # keep the inputs of blocks alone, in training

    excite_before_last: ClassVar[bool] = False
    """True if the gates stand before the last activation of a branch, not at its end."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, H, W, C], mask [N] -> logits float32 [N, num_classes]."""
        style = self.style()
        call: dict[str, Any] = {"train": train, "mask": mask}
        stages = expected_deviations(self.blocks(), self.alpha)
        x = self.stem(x.astype(self.dtype), style)
        index, total = 0, sum(map(len, stages))
        for stage, deviations in enumerate(stages):
            for block, deviation in enumerate(deviations):
                residual = PreActBlock(
                    layers=self.branch(x.shape[-1], stage, block),
                    deviation=deviation,
                    drop_rate=self.stochastic_depth * index / total,
                    style=style,
                    name=f"stage{stage + 1}_block{block + 1}",
                )
                x = call_block(residual, x, **call, remat=self.remat)
                index += 1
        act = self.norm.norm_act(name="norm_last", activation=style.activation)
        final = self.final_features(x.shape[-1])
        if final:
            x = linear_norm(style.layer(Layer(final), "conv_final"), act, x, **call)
        else:
            x = act(x, **call)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        x = dropout(self, x, self.dropout, train=train, axis_name=self.norm.axis_name)
        kernel_init = nn.initializers.normal(self.head_deviation)
        return self.conv.head(self.num_classes, kernel_init=kernel_init, name="head")(x)

    def blocks(self) -> tuple[int, ...]:
        """Returns the number of blocks of each stage."""
        raise NotImplementedError

    def stem(self, x: Array, style: Style) -> Array:
        """Returns the stream before the first block: x [N, H, W, C] -> [N, H', W', features]."""
        raise NotImplementedError

    def branch(self, channels: int, stage: int, block: int) -> tuple[Layer, ...]:
        """Returns the convolutions of a block (both numbers from 0) on a stream of `channels`."""
        raise NotImplementedError

    def final_features(self, channels: int) -> int | None:
        """Returns the width of a 1×1 convolution before the last activation; None: there is none.

        `channels` are those of the stream.
        """
        return None

    def style(self) -> Style:
        """Returns what all layers have in common; raises UserError for a word that is none."""
        for field, value, words in (
            ("beta", self.beta, BETAS),
            ("downsample", self.downsample, DOWNSAMPLINGS),
            ("padding", self.padding, PADDINGS),
        ):
            if value not in words:
                raise unknown(f"'model.{field}'", value, words)
        return Style(
            norm=self.norm,
            conv=self.conv,
            activation=scaled(self.activation, self.gain),
            alpha=self.alpha,
            beta=self.beta,
            skip_gain=self.skip_gain,
            squeeze_excite=self.squeeze_excite,
            excite_before_last=self.excite_before_last,
            downsample=self.downsample,
            same_padding=self.padding == "same",
            rescale_branches=self.rescale_branches,
            branch_dropout=0.0,
            dtype=self.dtype,
        )


def expected_deviations(stage_sizes: tuple[int, ...], alpha: float) -> list[list[float]]:
    """Returns β of each block of each stage, from a stem of variance 1.

    A branch adds α². The first block of a stage starts the sum from 1 again, as its shortcut
    does, but is itself divided by what came before (deepmind-research/nfnets/nf_resnet.py).
    """
    stages, variance = [], 1.0
    for blocks in stage_sizes:
        stages.append([0.0] * blocks)
        for block in range(blocks):
            stages[-1][block] = math.sqrt(variance)
            variance = (1.0 if block == 0 else variance) + alpha**2
    return stages


def check_widths(widths: tuple[int, ...], stage_sizes: tuple[int, ...]) -> None:
    """Raises UserError unless each stage has a width."""
    if len(widths) != len(stage_sizes):
        raise UserError(
            f"config field 'model.widths' = {widths} has {len(widths)} numbers, but "
            f"'model.stage_sizes' = {stage_sizes} has {len(stage_sizes)}"
        )


def grouped(channels: float, group_width: int) -> tuple[int, int]:
    """Returns (width, groups): the most whole groups of `group_width` within `channels`.

    Raises UserError if there is not one.
    """
    groups = int(channels) // group_width
    if groups == 0:
        raise UserError(
            f"config field 'model.group_width' = {group_width} is more than the {int(channels)} "
            f"channels of a branch; nearest: {int(channels)}"
        )
    return groups * group_width, groups
