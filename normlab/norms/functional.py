"""Moments and normalization as pure functions: arrays in, arrays out.

Statistics are computed in float32 at least. The variance is the corrected two-pass one (Chan, Golub
& LeVeque 1983, "Algorithms for computing the sample variance", eq. 1.7): it is accurate where the
one-pass E[x²] − E[x]² cancels (at mean/std = 10⁴ in float32 that one is off by a factor), and it
can never be negative. Gradients are written out, so that the backward pass keeps x and the mean
alone.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.typing import DTypeLike

Axes = tuple[int, ...]


@struct.dataclass
class Moments:
    """Count, mean and biased variance of sets of values; all three broadcast together."""

    count: Array  # values in each set, float
    mean: Array  # 0 where the count is 0
    var: Array  # biased (1/m); 0 where the count is 0


def statistics_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype in which statistics of values of `dtype` are computed: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)


def moments(x: Array, axes: Axes, mask: Array | None = None) -> Moments:
    """Returns the moments of `x` over `axes`, which stay as axes of length 1.

    `mask`, of x's rank and broadcastable to it, is true where a value counts. Gradients flow through
    mean and variance to the values that count.
    """
    axes = tuple(axis % x.ndim for axis in axes)
    mean, var = _mean_and_variance(x, mask, axes)
    return Moments(count=jnp.broadcast_to(_count(x, axes, mask), mean.shape), mean=mean, var=var)


def _count(x: Array, axes: Axes, mask: Array | None) -> Array:
    """Returns how many values count in each set; broadcasts against the mean."""
    dtype = statistics_dtype(x.dtype)
    if mask is None:
        return jnp.full((1,) * x.ndim, math.prod(x.shape[axis] for axis in axes), dtype)
    # A mask of length 1 along an axis of x (channels) stands for as many values as x has there.
    repeats = math.prod(x.shape[axis] // mask.shape[axis] for axis in axes)
    return jnp.sum(mask, axes, dtype=dtype, keepdims=True) * repeats


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _mean_and_variance(x: Array, mask: Array | None, axes: Axes) -> tuple[Array, Array]:
    dtype = statistics_dtype(x.dtype)
    count = jnp.maximum(_count(x, axes, mask), 1)
    values = x.astype(dtype)

    def average(values: Array) -> Array:
        kept = values if mask is None else jnp.where(mask, values, 0)
        return jnp.sum(kept, axes, keepdims=True) / count

    first = average(values)
    deviation = values - first
    error = average(deviation)  # what rounding left in the first mean
    var = average(jnp.square(deviation)) - jnp.square(error)
    return first + error, jnp.maximum(var, 0)


def _mean_and_variance_forward(
    x: Array, mask: Array | None, axes: Axes
) -> tuple[tuple[Array, Array], tuple[Array, Array | None, Array]]:
    mean, var = _mean_and_variance(x, mask, axes)
    return (mean, var), (x, mask, mean)


def _mean_and_variance_backward(
    axes: Axes, saved: tuple[Array, Array | None, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, None]:
    """∂mean/∂xᵢ = 1/m and ∂var/∂xᵢ = 2(xᵢ − mean)/m, for the values that count."""
    x, mask, mean = saved
    to_mean, to_var = cotangents
    count = jnp.maximum(_count(x, axes, mask), 1)
    deviation = x.astype(mean.dtype) - mean
    gradient = to_mean / count + deviation * (2 * to_var / count)
    if mask is not None:
        gradient = jnp.where(mask, gradient, 0)
    return gradient.astype(x.dtype), None


_mean_and_variance.defvjp(_mean_and_variance_forward, _mean_and_variance_backward)


def pool_moments(parts: Moments, axes: Axes) -> Moments:
    """Returns the moments of the union of the sets along `axes` (law of total variance).

    var = Σ m_i (var_i + (mean_i − mean)²) / Σ m_i; sets without values have no weight.
    """
    count = jnp.sum(parts.count, axes, keepdims=True)
    weight = parts.count / jnp.maximum(count, 1)
    mean = jnp.sum(weight * parts.mean, axes, keepdims=True)
    spread = parts.var + jnp.square(parts.mean - mean)
    return Moments(count=count, mean=mean, var=jnp.sum(weight * spread, axes, keepdims=True))


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Returns the moments of the union of two sets (Chan et al. 1983, eq. 2.1)."""
    stacked = jax.tree.map(lambda *parts: jnp.stack(jnp.broadcast_arrays(*parts)), a, b)
    return jax.tree.map(lambda array: array[0], pool_moments(stacked, (0,)))


def psum_moments(
    local: Moments, axis_name: str, index_groups: list[list[int]] | None = None
) -> Moments:
    """Returns the moments of the union over the devices of `axis_name`, weighted by their counts.

    `index_groups` splits the devices into groups that are pooled apart.
    """
    psum = partial(jax.lax.psum, axis_name=axis_name, axis_index_groups=index_groups)
    count = psum(local.count)
    weight = local.count / jnp.maximum(count, 1)
    mean = psum(weight * local.mean)
    var = psum(weight * (local.var + jnp.square(local.mean - mean)))
    return Moments(count=count, mean=mean, var=var)


def normalize(
    x: Array,
    mean: Array,
    var: Array,
    epsilon: float,
    scale: Array | None = None,
    bias: Array | None = None,
) -> Array:
    """Returns (x − mean) / √(var + epsilon) · scale + bias, in the statistics' dtype."""
    gain = jax.lax.rsqrt(var + epsilon)
    return affine((x.astype(gain.dtype) - mean) * gain, scale, bias)


def affine(y: Array, scale: Array | None, bias: Array | None) -> Array:
    """Returns y · scale + bias, either of which may be absent."""
    if scale is not None:
        y = y * scale.astype(y.dtype)
    if bias is not None:
        y = y + bias.astype(y.dtype)
    return y


def ema(old: Array, new: Array, momentum: float | Array) -> Array:
    """Returns momentum·old + (1 − momentum)·new, in old's dtype."""
    return (momentum * old + (1 - momentum) * new).astype(old.dtype)


def expand_mask(mask: Array | None, ndim: int) -> Array | None:
    """Returns the mask [N] or [N, ...] (without channels) as bool of rank `ndim`, axes of 1 added.

    Raises ValueError if the mask has channels' rank or more.
    """
    if mask is None:
        return None
    if mask.ndim >= ndim:
        raise ValueError(f"mask of shape {mask.shape} must have at most {ndim - 1} axes: no channels")
    return mask.astype(bool).reshape(*mask.shape, *[1] * (ndim - mask.ndim))


def finite_where_masked(x: Array, mask: Array | None) -> Array:
    """Returns x with 0 for what is masked and not finite: padding of any content stays harmless."""
    if mask is None:
        return x
    return jnp.where(mask | jnp.isfinite(x), x, 0)
