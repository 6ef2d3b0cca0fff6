"""Weight Normalization. Salimans & Kingma 2016, arXiv:1602.07868.

w = g · v/‖v‖ for each output unit (eq. 2), so that ∂L/∂g = ∂L/∂w · v/‖v‖ and
∂L/∂v = (g/‖v‖)(I − v vᵀ/‖v‖²) ∂L/∂w (eq. 3): the gradient of v is orthogonal to v, and ‖v‖ only
grows.

Notes:
* A norm of zero gives weights of zero, not NaN.
* Data-dependent initialization (section 3): with t = v·x/‖v‖ over the first batch, g = 1/σ[t] and
  b = −μ[t]/σ[t], layer by layer, so that every pre-activation starts with mean 0 and variance 1.
  Public code adds 1e-10 to σ²; here a unit that is constant over the batch keeps its g and b, where
  that would give g = 1e5.
* The paper draws v from N(0, 0.05²); here v is drawn as plain weights are, and g starts as ‖v‖
  (PyTorch, Flax's first step), so that the layer starts as the plain one of its seed.
"""

import jax.numpy as jnp
from jax import Array

from normlab.norms.functional import moments, rsqrt_or_zero, statistics_dtype


def weight_norms(kernel: Array) -> Array:
    """Returns ‖v‖ [features] of each output unit: kernel [..., inputs, features]."""
    return jnp.sqrt(_square_norms(kernel))


def normalized_weights(kernel: Array, gain: Array) -> Array:
    """Returns g·v/‖v‖ in float32 at least: kernel v [..., inputs, features], gain g [features]."""
    values = kernel.astype(statistics_dtype(kernel.dtype))
    return values * (rsqrt_or_zero(_square_norms(kernel)) * gain)


def data_dependent_start(
    y: Array, gain: Array, bias: Array | None
) -> tuple[Array, Array | None, Array]:
    """Returns (gain, bias, output) with which each unit has mean 0 and variance 1 over y.

    y [N, ..., features] is the layer's output with `gain` and without bias: y = g·t. A layer
    without bias is scaled only. A unit whose y is constant or not finite keeps its values.
    """
    found = moments(y, tuple(range(y.ndim - 1)))
    mean, var = found.mean.reshape(-1), found.var.reshape(-1)
    usable = (var > 0) & jnp.isfinite(var)
    slope = jnp.where(usable, rsqrt_or_zero(var), 1.0)
    started = None if bias is None else jnp.where(usable, -mean * slope, bias).astype(bias.dtype)
    output = y * slope if started is None else y * slope + started
    return (gain * slope).astype(gain.dtype), started, output.astype(y.dtype)


def _square_norms(kernel: Array) -> Array:
    values = kernel.astype(statistics_dtype(kernel.dtype))
    return jnp.sum(jnp.square(values), tuple(range(kernel.ndim - 1)))
