"""Dropout and stochastic depth: only where a model trains and has the random key `dropout`.

Evaluation has no such key, nor has a pass that gathers statistics. What is drawn for an example is
a function of its place in the batch, so a replica that has a share of it draws for the whole batch
and takes its own. Then `axis_name` is the axis of its devices (`NormFactory.axis_name`), else None.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

KEY = "dropout"
"""Name of the random key; each module draws its own from it, by its path."""


def dropout(
    module: nn.Module, x: Array, rate: float, *, train: bool, axis_name: str | None
) -> Array:
    """Returns x with each value zero at `rate`, the others over 1 − rate.

    Srivastava et al. 2014 (JMLR 15), scaled in training in place of evaluation.
    """
    return _drop(module, x, rate, x.shape, rescale=True, train=train, axis_name=axis_name)


def drop_branch(
    module: nn.Module,
    y: Array,
    rate: float,
    *,
    rescale: bool,
    train: bool,
    axis_name: str | None,
) -> Array:
    """Returns a residual branch y [N, ...] with whole examples of it zero at `rate`.

    Stochastic depth, Huang et al. 2016 (arXiv:1603.09382), by example as in EfficientNet. With
    `rescale` what stays is divided by 1 − rate, without it (as in the nets without normalizers)
    it is not.
    """
    shape = (len(y), *[1] * (y.ndim - 1))
    return _drop(module, y, rate, shape, rescale=rescale, train=train, axis_name=axis_name)


def _drop(
    module: nn.Module,
    x: Array,
    rate: float,
    shape: tuple[int, ...],
    *,
    rescale: bool,
    train: bool,
    axis_name: str | None,
) -> Array:
    if rate == 0 or not (train and module.has_rng(KEY)):
        return x
    key, examples = module.make_rng(KEY), shape[0]
    if axis_name is None:
        keep = jax.random.bernoulli(key, 1 - rate, shape)
    else:
        every = (examples * jax.lax.axis_size(axis_name), *shape[1:])
        first = jax.lax.axis_index(axis_name) * examples
        keep = jax.random.bernoulli(key, 1 - rate, every)
        keep = jax.lax.dynamic_slice_in_dim(keep, first, examples)
    return jnp.where(keep, x / (1 - rate) if rescale else x, jnp.zeros((), x.dtype))
