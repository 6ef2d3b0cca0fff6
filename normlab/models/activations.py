"""Activations by config name."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax import Array


def relu(x: Array) -> Array:
    """Returns max(x, 0), and NaN for NaN.

    `jax.nn.relu` under jit may turn NaN into 0 on a CPU (its maximum follows C's fmax), and a
    network that has broken down would report a finite loss. The gradient at 0 is 0, as there.
    """
    return jnp.where(x <= 0, jnp.zeros((), x.dtype), x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": relu,
    "sigmoid": nn.sigmoid,
    "tanh": nn.tanh,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "elu": nn.elu,
    "leaky_relu": nn.leaky_relu,
}
