"""What theory says of signals and gradients in wide random networks: numbers, and no model.

Gradients. Yang, Pennington, Rao, Sohl-Dickstein & Schoenholz 2019, arXiv:1902.08129: without
residual connections batch normalization makes gradients explode with depth, whatever the
activation. Here the limit of large batches, which needs no more than this: backwards through
y = W φ(x̂), x̂ = BN(y'), a squared norm is multiplied by σ_w² E[φ'²] at the layer, and by 1/Var(y')
at the normalizer, whose input has variance σ_w² Var φ; so it grows by E[φ'²] / Var φ a layer. Of a
linear network it grows by (B − 2)/(B − 3) at a batch of B: the exact result of the paper for
φ = id. These are factors of the *squared* norm; the norm's are their roots.

Signals. Hanin & Rolnick 2018 and De & Smith 2020 (arXiv:2002.10444) on residual networks, Brock, De
& Smith 2021 (arXiv:2101.08692, sections 3 and 4) on plots of them. The state of a layer is
(mean_squared, variance): means over channels of the squared mean and of the variance of a channel,
over examples and positions. A channel is Gaussian in the limit of many channels, and over the
channels, so is its mean. All examples are alike, and no padding is reckoned with.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from normlab.models.activations import ACTIVATIONS, normal_quadrature, relu

Activation = Callable[[Array], Array]


def gradient_growth(activation: Activation, batch_size: int | None = None) -> float:
    """Returns the factor by which a squared gradient norm grows with each layer towards the input.

    Of a network of layers activation(BN(W x)) at the start. `batch_size` counts only for the
    identity, where the result is exact; for other activations, and for None, it is the limit of
    large batches. Raises ValueError for a linear network at a batch of 3 or fewer, where it is
    infinite.
    """
    if activation is ACTIVATIONS["identity"] and batch_size is not None:
        if batch_size <= 3:
            raise ValueError(f"a linear network has no growth factor at a batch of {batch_size}")
        return (batch_size - 2) / (batch_size - 3)
    z, weights = normal_quadrature()
    values, slopes = _values(activation, z), _values(jax.vmap(jax.grad(activation)), z)
    variance = weights @ (values - weights @ values) ** 2
    return float(weights @ slopes**2 / variance)


class Signal(NamedTuple):
    """What a plot of signal propagation shows of an array [N, ..., C]."""

    mean_squared: float  # mean over channels of (mean over the rest)²
    variance: float  # mean over channels of the variance over the rest


STANDARD = Signal(0.0, 1.0)
"""That of a normalized array, and of standardized or Gaussian images."""


class BlockSignal(NamedTuple):
    """A residual block: the end of its branch, and its output."""

    branch: Signal
    stream: Signal


def after_layer(signal: Signal, activation: Activation, weight_variance: float = 2.0) -> Signal:
    """Returns the signal behind a random layer W φ(x), Var W = weight_variance / fan-in.

    A channel is x = √mean_squared·u + √variance·v with independent normal u (one a channel) and v
    (one a value), so the mean of φ is E_v φ, a function of u.
    """
    z, weights = normal_quadrature()
    u = np.sqrt(signal.mean_squared) * z if signal.mean_squared else np.zeros(1)
    over_u = weights if signal.mean_squared else np.ones(1)
    values = _values(activation, u[:, None] + np.sqrt(signal.variance) * z)
    means = values @ weights
    second_moment = over_u @ (values**2 @ weights)
    mean_squared = over_u @ means**2
    return Signal(
        float(weight_variance * mean_squared),
        float(weight_variance * (second_moment - mean_squared)),
    )


def plain_signals(
    transitions: Sequence[bool],
    activation: Activation = relu,
    *,
    start: Signal = STANDARD,
    layers: int = 2,
    weight_variance: float = 2.0,
) -> list[BlockSignal]:
    """Returns the blocks of x + W φ(W φ(x)) without a normalizer: with relu and He's weights of
    variance 2 / fan-in the second moment doubles.

    A block where `transitions` is true has W φ(x) as its shortcut, which keeps the second moment:
    it doubles there, too. `layers`: those of a branch.
    """
    blocks, stream = [], start
    for transition in transitions:
        branch = shortcut = after_layer(stream, activation, weight_variance)
        for _ in range(layers - 1):
            branch = after_layer(branch, activation, weight_variance)
        stream = _sum(shortcut if transition else stream, branch)
        blocks.append(BlockSignal(branch, stream))
    return blocks


def batch_norm_signals(
    transitions: Sequence[bool],
    activation: Activation = relu,
    *,
    start: Signal = STANDARD,
    norm_last: bool = False,
    weight_variance: float = 2.0,
) -> list[BlockSignal]:
    """Returns the blocks of x + W φ(BN(W φ(BN(x)))): with relu and He's weights the stream grows
    by 1 a block, 1/π of it in the squared means and 1 − 1/π in the variance.

    A block where `transitions` is true has as its shortcut a layer of its own behind the first
    φ(BN(x)), so that the stream starts again. `norm_last`: the branch ends in a normalizer,
    x + BN(W ...), and the 1 is all variance; so does the shortcut.
    """
    branch = STANDARD if norm_last else after_layer(STANDARD, activation, weight_variance)
    blocks, stream = [], start
    for transition in transitions:
        stream = _sum(branch if transition else stream, branch)
        blocks.append(BlockSignal(branch, stream))
    return blocks


def normalizer_free_signals(
    transitions: Sequence[bool], alpha: float = 0.2, *, start: float = 1.0
) -> list[BlockSignal]:
    """Returns the blocks of h + α f(h / β), β² the expected variance: 1 + kα² after k blocks.

    Scaled weight standardization and the gain γ of the activation keep the variance of f at 1 and
    its mean at 0. A block where `transitions` is true has as its shortcut a layer behind its first
    activation: variance 1 again, and 1 + α² behind the block. `start`: variance before the first.
    """
    blocks, variance = [], start
    for transition in transitions:
        variance = (1.0 if transition else variance) + alpha**2
        blocks.append(BlockSignal(STANDARD, Signal(0.0, variance)))
    return blocks


def _sum(a: Signal, b: Signal) -> Signal:
    """Returns the signal of a sum whose second term comes from weights of its own."""
    return Signal(a.mean_squared + b.mean_squared, a.variance + b.variance)


def _values(function: Callable[[Array], Array], z: np.ndarray) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(function(jnp.asarray(z, jnp.float64)), np.float64)
