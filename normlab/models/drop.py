"""Dropout and stochastic depth: only where a model trains and has the random key `dropout`.

Evaluation has no such key, nor has a pass that gathers statistics.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

KEY = "dropout"
"""Name of the random key; each module draws its own from it, by its path."""


def dropout(module: nn.Module, x: Array, rate: float, *, train: bool) -> Array:
    """Returns x with each value zero at `rate`, the others over 1 − rate.

    Srivastava et al. 2014 (JMLR 15), scaled in training in place of evaluation.
    """
    return _drop(module, x, rate, x.shape, rescale=True, train=train)


def drop_branch(module: nn.Module, y: Array, rate: float, *, rescale: bool, train: bool) -> Array:
    """Returns a residual branch y [N, ...] with whole examples of it zero at `rate`.

    Stochastic depth, Huang et al. 2016 (arXiv:1603.09382), by example as in EfficientNet. With
    `rescale` what stays is divided by 1 − rate, without it (as in the nets without normalizers)
    it is not.
    """
    shape = (len(y), *[1] * (y.ndim - 1))
    return _drop(module, y, rate, shape, rescale=rescale, train=train)


def _drop(
    module: nn.Module, x: Array, rate: float, shape: tuple[int, ...], *, rescale: bool, train: bool
) -> Array:
    if rate == 0 or not (train and module.has_rng(KEY)):
        return x
    keep = jax.random.bernoulli(module.make_rng(KEY), 1 - rate, shape)
    return jnp.where(keep, x / (1 - rate) if rescale else x, jnp.zeros((), x.dtype))
