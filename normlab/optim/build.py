"""Optimizers: a direction by optax, to be multiplied by minus the learning rate.

The rate is applied by the train step, from the run's own step, so that a step skipped for a
non-finite value neither shifts the schedule nor hides in an optimizer's private counter.
"""

import dataclasses

import optax
from ml_collections import ConfigDict

from normlab.errors import UserError
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

    In order: clipping of the global norm, coupled weight decay, momentum or moments, decoupled
    weight decay, LAMB's trust ratio. Raises UserError for a value out of range.
    """
    optim = config.optim
    if optim.weight_decay < 0:
        raise UserError(
            f"config field 'optim.weight_decay' = {optim.weight_decay} must be 0 or more"
        )
    if optim.clip_norm is not None and optim.clip_norm <= 0:
        raise UserError(f"config field 'optim.clip_norm' = {optim.clip_norm} must be above 0")
    role_mask({}, optim.decay_roles)  # refuses unknown roles before anything is compiled
    clipping = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity()
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
