"""Which prediction of `mean_field` is one for a model at hand: the theory's conditions, checked."""

import re
from collections.abc import Sequence
from typing import Any

import jax

from normlab.analysis.mean_field import (
    BlockSignal,
    Signal,
    batch_norm_signals,
    gradient_growth,
    normalizer_free_signals,
    plain_signals,
)
from normlab.analysis.subject import Subject
from normlab.models.activations import ACTIVATIONS

PLAIN_MODELS = ("mlp", "deep_mlp")
"""Models of layers activation(BN(W x))."""

SMALL_EPSILON = 1e-3
"""The largest ε that a variance of about 1 does not notice: the theory has none."""

PREACTIVATION = re.compile(r"(preact_|nf_|wide_|skipinit_)resnet\d*")
"""Models of blocks x + α·W φ(norm(W φ(norm(x/β)))), with a 1×1 convolution behind the first φ as
the shortcut where the shape changes."""


def predicted_growth(subject: Subject) -> tuple[float, str] | None:
    """Returns the growth of the squared norm a layer by `mean_field`, and what it holds for.

    None where it says nothing: it does for batch normalization in a plain network of standard
    layers, without overrides, at its start on Gaussian images.
    """
    config = subject.parts.config
    fits = (
        config.model.kind in PLAIN_MODELS
        and _starts_on_noise(subject)
        and config.norm.kind == "batch_norm"
        and config.conv.kind == "standard"
        and config.model.get("weights") != "orthogonal"  # the theory's are Gaussian
    )
    if not fits:
        return None
    scope = config.batch_stats
    group = scope.ghost_size if scope.scope == "ghost" else subject.parts.length.batch_size
    if scope.scope == "device":
        group //= jax.device_count()
    if config.model.activation != "identity":
        return gradient_growth(ACTIVATIONS[config.model.activation]), "limit of large batches"
    if group <= 3:
        return None
    return gradient_growth(ACTIVATIONS["identity"], group), f"exact for a batch of {group}"


def predicted_signals(subject: Subject, blocks: Sequence[str]) -> list[BlockSignal] | None:
    """Returns the signals of the residual blocks by `mean_field`; None where it says nothing.

    It does for pre-activation networks at their start on Gaussian images, with batch normalization,
    normalizer-free with a skip gain of 1, and with neither; without gates, and with strides in the
    shortcuts' convolutions (means over pixels have less variance). A normalizer-free branch has
    variance 1 if 1/β stands before the activation, or behind a relu, where that is the same. It
    reckons with no padding by zeros, which takes some off at the borders, and takes what the stem
    hands on for Gaussian, which a max pooling is not.
    """
    config = subject.parts.config
    fits = (
        PREACTIVATION.fullmatch(config.model.kind)
        and _starts_on_noise(subject)
        and config.model.downsample == "conv"
        and config.model.squeeze_excite == 0
    )
    if not fits:
        return None
    params = subject.parts.abstract_variables()["params"]
    transitions = ["conv_shortcut" in params[block] for block in blocks]
    fields, activation = config.model, ACTIVATIONS[config.model.activation]
    kinds = (config.norm.kind, config.conv.kind)
    if fields.skip_gain not in (None, 1.0):
        return None
    if kinds == ("none", "scaled_weight_standardization"):
        scaled = fields.gain != "none" and (
            fields.beta == "before" or (fields.beta == "behind" and fields.activation == "relu")
        )
        return normalizer_free_signals(transitions, fields.alpha) if scaled else None
    if (fields.alpha, fields.beta, fields.gain) != (1.0, "none", "none"):
        return None
    stem = Signal(0.0, 2.0)  # He's weights, on images of variance 1
    if kinds == ("batch_norm", "standard"):
        return batch_norm_signals(transitions, activation, start=stem)
    if kinds == ("none", "standard"):
        layers = _num_layers(params[blocks[0]])
        return plain_signals(transitions, activation, start=stem, layers=layers)
    return None


def _starts_on_noise(subject: Subject) -> bool:
    """True for initial values and Gaussian images, one normalizer everywhere and its ε small."""
    config = subject.parts.config
    return (
        subject.variables is None
        and subject.inputs == "gaussian"
        and not config.norm_overrides
        and config.norm.get("epsilon", 0.0) <= SMALL_EPSILON
    )


def _num_layers(block: Any) -> int:
    return sum(re.fullmatch(r"conv\d+", name) is not None for name in block)
