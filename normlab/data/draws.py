"""The random keys of a step: each kind of draw has its own, so toggling one moves no other.

All are functions of (seed, step) alone, so a resumed run draws what it would have drawn.
"""

import jax
from jax import Array

CROP, FLIP, CUTOUT = 1, 2, 3
MIXING, MIXUP, CUTMIX = 4, 5, 6
RANDAUGMENT = 7
DROPOUT = 8
"""Numbers of the kinds; never changed, or every run made before would be unpaired."""


def step_key(seed: Array | int, step: Array | int) -> Array:
    """Returns the random key of one step; seed and step may be traced."""
    return jax.random.fold_in(jax.random.key(seed), step)


def dropout_key(seed: Array | int, step: Array | int) -> Array:
    """Returns the key that a model draws dropout and stochastic depth with at one step."""
    return jax.random.fold_in(step_key(seed, step), DROPOUT)
