"""Learning rate as a pure function of the step. Durations are steps; the peak is given.

Linear warmup from zero follows Goyal et al. 2017 (arXiv:1706.02677), cosine decay to zero
Loshchilov & Hutter 2017 (arXiv:1608.03983) without restarts; decay starts when warmup ends.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from normlab.errors import UserError, unknown
from normlab.run_length import RunLength

Schedule = Callable[[Array | int], Array]

SHAPES = ("constant", "piecewise", "cosine", "linear")


def peak_learning_rate(config: ConfigDict) -> float:
    """Returns `base_lr`, times batch / `reference_batch_size` where that is set (Goyal et al.)."""
    optim = config.optim
    if optim.base_lr <= 0:
        raise UserError(f"config field 'optim.base_lr' = {optim.base_lr} must be above 0")
    if optim.reference_batch_size is None:
        return optim.base_lr
    if optim.reference_batch_size < 1:
        raise UserError(
            f"config field 'optim.reference_batch_size' = {optim.reference_batch_size} "
            "must be 1 or more"
        )
    return optim.base_lr * config.train.batch_size / optim.reference_batch_size


def build_schedule(config: ConfigDict, length: RunLength) -> Schedule:
    """Returns the learning rate at a step (int or int array, from 0).

    Raises UserError for an unknown shape, or a warmup longer than the run.
    """
    optim = config.optim
    if optim.schedule not in SHAPES:
        raise unknown("'optim.schedule'", optim.schedule, SHAPES)
    peak = peak_learning_rate(config)
    warmup = length.steps(optim, "warmup", "optim") or 0
    milestones = length.steps(optim, "milestones", "optim") or ()
    if warmup >= length.num_steps and warmup > 0:
        raise UserError(
            f"config field 'optim.warmup' is {warmup} steps, but the run has {length.num_steps}"
        )
    decay_steps = length.num_steps - warmup

    def schedule(step: Array | int) -> Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / decay_steps, 0.0, 1.0)
        if optim.schedule == "piecewise":
            passed = sum(jnp.where(step >= milestone, 1.0, 0.0) for milestone in milestones)
            factor = optim.decay_factor**passed
        elif optim.schedule == "cosine":
            factor = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        elif optim.schedule == "linear":
            factor = 1.0 - progress
        else:
            factor = 1.0
        # Step 0 takes 1/warmup of the peak: a first step of rate zero would be a step lost.
        ramp = jnp.minimum((step + 1.0) / warmup, 1.0) if warmup else 1.0
        return jnp.asarray(peak * ramp * factor, jnp.float32)

    return schedule
