"""Optimizers: a direction by optax, to be multiplied by minus the learning rate.

The rate is applied by the train step, from the run's own step, so that a step skipped for a
non-finite value neither shifts the schedule nor hides in an optimizer's private counter.
"""

import dataclasses
from fnmatch import fnmatchcase
from typing import Any

import optax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from normlab.errors import UserError, unknown
from normlab.optim.agc import adaptive_grad_clip
from normlab.optim.masks import role_mask


@dataclasses.dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum (PyTorch's form: v <- m·v + g, no dampening)."""

    momentum: float = 0.9  # weight of the old velocity; 0: plain gradient descent
    nesterov: bool = False  # Nesterov's look-ahead: step along m·v + g


@dataclasses.dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980); weight decay is added to the gradient."""

    b1: float = 0.9  # weight of the old first moment
    b2: float = 0.999  # weight of the old second moment
    eps: float = 1e-8  # added to the root of the second moment


@dataclasses.dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101)."""


@dataclasses.dataclass(frozen=True)
class LAMB(Adam):
    """AdamW scaled per parameter by |w| / |update| (You et al. 2020, arXiv:1904.00962)."""

    eps: float = 1e-6  # added to the root of the second moment


OPTIMIZERS: dict[str, type] = {"sgd": SGD, "adam": Adam, "adamw": AdamW, "lamb": LAMB}
"""Optimizer by config name."""


def build_direction(config: ConfigDict) -> optax.GradientTransformation:
    """Returns the transformation from gradients to the direction that the learning rate scales.

    In order: clipping of the global norm, adaptive clipping by unit, coupled weight decay, momentum
    or moments, decoupled weight decay, LAMB's trust ratio. Raises UserError for a value out of
    range.
    """
    optim = config.optim
    if optim.weight_decay < 0:
        raise UserError(
            f"config field 'optim.weight_decay' = {optim.weight_decay} must be 0 or more"
        )
    if optim.clip_norm is not None and optim.clip_norm <= 0:
        raise UserError(f"config field 'optim.clip_norm' = {optim.clip_norm} must be above 0")
    for name in ("agc_clipping", "agc_epsilon", "sam_rho"):
        if optim[name] is not None and optim[name] <= 0:
            raise UserError(f"config field 'optim.{name}' = {optim[name]} must be above 0")
    role_mask({}, optim.decay_roles)  # refuses unknown roles before anything is compiled
    clipping = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity()
    if optim.agc_clipping is not None:
        agc = adaptive_grad_clip(optim.agc_clipping, optim.agc_epsilon, **agc_settings(config))
        clipping = optax.chain(clipping, agc)
    decay = optax.identity()
    if optim.weight_decay:
        decay = optax.add_decayed_weights(
            optim.weight_decay, mask=lambda params: role_mask(params, optim.decay_roles)
        )
    if optim.kind == "sgd":
        momentum = (
            optax.trace(optim.momentum, optim.nesterov) if optim.momentum else optax.identity()
        )
        return optax.chain(clipping, decay, momentum)
    moments = optax.scale_by_adam(optim.b1, optim.b2, optim.eps)
    if optim.kind == "adam":
        return optax.chain(clipping, decay, moments)
    trust = optax.scale_by_trust_ratio() if optim.kind == "lamb" else optax.identity()
    return optax.chain(clipping, moments, decay, trust)


def agc_settings(config: ConfigDict) -> dict[str, Any]:
    """Returns `exclude` and `groups` of `agc.units`.

    Raises UserError for what is not pattern=λ with λ above 0.
    """
    groups = []
    for text in config.optim.agc_groups:
        pattern, _, value = text.partition("=")
        try:
            clipping = float(value)
        except ValueError:
            clipping = 0.0
        if not (pattern.strip() and clipping > 0):
            raise UserError(
                f"config field 'optim.agc_groups' has {text!r}, "
                "which is not pattern=λ with λ above 0"
            )
        groups.append((pattern.strip(), clipping))
    return {"exclude": tuple(config.optim.agc_exclude), "groups": tuple(groups)}


def check_agc(config: ConfigDict, params: Any) -> None:
    """Raises UserError for a pattern of the config that fits no parameter (of arrays or shapes)."""
    paths = list(flatten_dict(params, sep="/"))
    settings = agc_settings(config)
    named = {
        "'optim.agc_exclude'": settings["exclude"],
        "'optim.agc_groups'": tuple(pattern for pattern, _ in settings["groups"]),
    }
    for field, patterns in named.items():
        for pattern in patterns:
            if not any(fnmatchcase(path, pattern) for path in paths):
                raise unknown(f"parameter in {field}", pattern, paths)
