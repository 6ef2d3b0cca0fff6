"""Moments and normalization as pure functions: arrays in, arrays out.

Statistics are computed in float32 at least, from x − s with s a constant near the mean:

    var = E[(x − s)²] − E[x − s]²
    y = (x − s)·a + (bias − (mean − s)·a),    a = scale / √(var + ε)

Both hold for every s, and so do their derivatives of all orders, hence s carries no gradient. They
keep their digits where the bare E[x²] − E[x]² cancels (at mean/std = 10⁴ in float32 that one is off
by a factor): if s is the mean of a fraction f of the values, then (mean − s)² ≤ var·(1 − f)/f
whatever the data, because var contains the spread between the two parts. So f = 1/64 costs at most
two of float32's seven digits, and no second pass over x is needed. The gradient takes two sums over
the batch (of dy and of dy·(x − s)), where the textbook form takes three. It makes x − s again
(`jax.checkpoint`), so of the forward pass only x and statistics are kept.

Source of shift and merge: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample
variance".
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.typing import DTypeLike

Axes = tuple[int, ...]

_PILOT = 64  # a rough mean without a mask is over at least 1/64 of the values


class Moments(struct.PyTreeNode):
    """Count, mean and biased variance of sets of values: three arrays of one shape.

    A normalizer that decorrelates channels has their covariance, too.
    """

    count: Array  # values in each set, float
    mean: Array  # 0 where the count is 0
    var: Array  # biased (1/m); 0 where the count is 0
    covariance: Array | None = None  # biased, of groups of D channels: [..., C/D, D, D]


def statistics_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype in which statistics of values of `dtype` are computed: float32 or wider.

    Raises ValueError for integers, to which normalized values would be rounded.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"a normalizer takes floating-point values, not {jnp.dtype(dtype).name}")
    return jnp.promote_types(dtype, jnp.float32)


# Moments -----------------------------------------------------------------------------------------


def rough_mean(x: Array, axes: Axes, mask: Array | None = None, along: int | None = None) -> Array:
    """Returns a constant near the mean of `x` over `axes`, which stay as axes of length 1.

    Without a mask it is the mean over the first 1/64 (rounded up) along one of `axes`: `along`, by
    default the second (the first is often examples, which devices share out). It carries no
    gradient.
    """
    if mask is not None:
        return jax.lax.stop_gradient(_mean(_masked(x, mask), axes, _count(x, axes, mask)))
    if along is None and len(axes) > 1:
        along = axes[1]
    if along is not None:
        x = jax.lax.slice_in_dim(x, 0, -(-x.shape[along] // _PILOT), axis=along)
    values = x.astype(statistics_dtype(x.dtype))
    return jax.lax.stop_gradient(values.mean(axes, keepdims=True))


def moments(x: Array, axes: Axes, mask: Array | None = None, shift: Array | None = None) -> Moments:
    """Returns the moments of `x` over `axes`, which stay as axes of length 1.

    `mask`, of x's rank and broadcastable to it, is true where a value counts. `shift` is a constant
    near the mean (default `rough_mean`); it changes nothing but rounding errors.
    """
    shift = rough_mean(x, axes, mask) if shift is None else shift
    count = _count(x, axes, mask)
    mean, square = _shifted_moments(x, shift, mask, count, axes)
    var = jnp.maximum(square - jnp.square(mean), 0)
    mean = mean + shift if mask is None else jnp.where(count > 0, mean + shift, 0)
    return Moments(count=jnp.broadcast_to(count, mean.shape), mean=mean, var=var)


@partial(jax.checkpoint, static_argnums=(4,))  # the gradient makes x − shift again from x
def _shifted_moments(
    x: Array, shift: Array, mask: Array | None, count: Array, axes: Axes
) -> tuple[Array, Array]:
    """Returns E[x − shift] and E[(x − shift)²]."""
    centered = _masked(x.astype(statistics_dtype(x.dtype)) - shift, mask)
    return _mean(centered, axes, count), _mean(jnp.square(centered), axes, count)


def _count(x: Array, axes: Axes, mask: Array | None) -> Array:
    """Returns how many values count in each set; broadcasts against the mean."""
    dtype = statistics_dtype(x.dtype)
    if mask is None:
        return jnp.full((1,) * x.ndim, math.prod(x.shape[axis] for axis in axes), dtype)
    # A mask of length 1 along an axis of x (channels) stands for as many values as x has there.
    repeats = math.prod(x.shape[axis] // mask.shape[axis] for axis in axes)
    return jnp.sum(mask, axes, dtype=dtype, keepdims=True) * repeats


def _masked(x: Array, mask: Array | None) -> Array:
    return x if mask is None else jnp.where(mask, x, 0)


def _mean(x: Array, axes: Axes, count: Array) -> Array:
    values = x.astype(statistics_dtype(x.dtype))
    return jnp.sum(values, axes, keepdims=True) / jnp.maximum(count, 1)


def masked_mean(x: Array, axes: Axes, mask: Array | None = None) -> Array:
    """Returns E[x] over `axes`, which stay as axes of length 1; 0 over no values."""
    return _mean(_masked(x, mask), axes, _count(x, axes, mask))


@partial(jax.checkpoint, static_argnums=(1,))
def mean_square(x: Array, axes: Axes, mask: Array | None = None) -> Array:
    """Returns E[x²] over `axes`, which stay as axes of length 1; 0 over no values."""
    return masked_mean(jnp.square(x.astype(statistics_dtype(x.dtype))), axes, mask)


def unbiased(var: Array, count: Array) -> Array:
    """Returns var · n/(n − 1) (Bessel's correction); 0 for a single value."""
    return var * (count / jnp.maximum(count - 1, 1))


def pool_moments(parts: Moments, axes: Axes) -> Moments:
    """Returns the moments of the union of the sets along `axes`, which stay, of length 1."""
    return _pool(parts, lambda part: jnp.sum(part, axes, keepdims=True))


def _pool(parts: Moments, total: Callable[[Array], Array]) -> Moments:
    """Returns the moments of the unions of the sets that `total` sums (law of total variance).

    var = Σ m_i (var_i + (mean_i − mean)²) / Σ m_i; sets without values have no weight.
    """
    count = total(parts.count)
    weight = parts.count / jnp.maximum(count, 1)
    mean = total(weight * parts.mean)
    var = total(weight * (parts.var + jnp.square(parts.mean - mean)))
    union = Moments(count=count, mean=mean, var=var)
    if parts.covariance is None:
        return union
    spread = _weighted_spread(parts.covariance, parts.mean - mean, weight)
    return union.replace(covariance=total(spread))


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Returns the moments of the union of two sets (Chan et al. 1983, eq. 2.1)."""
    stacked = jax.tree.map(lambda *parts: jnp.stack(jnp.broadcast_arrays(*parts)), a, b)
    return jax.tree.map(lambda array: array[0], pool_moments(stacked, (0,)))


def blend_moments(old: Moments, new: Moments, weight: Array | float) -> Moments:
    """Returns the moments of a mixture: (1 − weight)·E_old + weight·E_new of both x and x².

    It is the law of total variance, so nothing cancels where the mean is large.
    """
    share = jnp.broadcast_to(jnp.asarray(weight, new.mean.dtype), new.mean.shape)
    return merge_moments(old.replace(count=1 - share), new.replace(count=share))


def pool_channels(channels: Moments, num_groups: int) -> Moments:
    """Returns moments [..., C] pooled over each group of neighbouring channels, for every channel.

    `num_groups` divides C. A group's moments are repeated over its channels by a product with ones:
    XLA would put a repetition into the loop over positions that comes next, where it is slow.
    """
    size = channels.mean.shape[-1] // num_groups
    if size == 1:
        return channels
    ones = jnp.ones((size, size), channels.mean.dtype)

    def total(part: Array) -> Array:
        groups = part.reshape(-1, size)
        return jnp.matmul(groups, ones, precision=jax.lax.Precision.HIGHEST).reshape(part.shape)

    return _pool(channels, total)


def psum_moments(
    local: Moments, axis_name: str, index_groups: list[list[int]] | None = None
) -> Moments:
    """Returns the moments of the union over the devices of `axis_name`, weighted by their counts.

    `index_groups` splits the devices into groups that are pooled apart.
    """
    return _pool(local, partial(jax.lax.psum, axis_name=axis_name, axis_index_groups=index_groups))


def covariance(x: Array, mean: Array, mask: Array | None, group_size: int) -> Array:
    """Returns the biased covariance of each group of channels: [G, 1, ..., 1, C/D, D, D].

    x: [G, N, ..., C], with a mask of its rank; mean: [G, 1, ..., 1, C]; D = `group_size`.
    """
    count = _count(x, tuple(range(1, x.ndim - 1)), mask)
    centered = _masked(x.astype(statistics_dtype(x.dtype)) - mean, mask)
    centered = centered.reshape(x.shape[0], -1, x.shape[-1] // group_size, group_size)
    products = jnp.einsum(
        "gnci,gncj->gcij", centered, centered, precision=jax.lax.Precision.HIGHEST
    )
    lead = mean.shape[:-1]
    return products.reshape(*lead, *products.shape[1:]) / jnp.maximum(count, 1)[..., None, None]


def _weighted_spread(covariance: Array, deviation: Array, weight: Array) -> Array:
    """Returns weight · (covariance + deviation deviationᵀ) in the groups of `covariance`."""
    grouped = deviation.reshape(covariance.shape[:-1])
    weight = weight.reshape(grouped.shape)[..., :1, None]
    return weight * (covariance + grouped[..., :, None] * grouped[..., None, :])


# Normalization -----------------------------------------------------------------------------------


def normalize(
    x: Array,
    mean: Array,
    inverse_std: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    shift: Array | None = None,
) -> Array:
    """Returns (x − mean) · inverse_std · scale + bias in the statistics' dtype.

    `shift` is the constant that `moments` had, so that x − shift is computed once (default: the
    mean).
    """
    shift = jax.lax.stop_gradient(mean) if shift is None else shift
    slope = inverse_std if scale is None else inverse_std * scale
    offset = (shift - mean) * slope
    if bias is not None:
        offset = offset + bias
    return _shift_and_scale(x, shift, slope, offset)


@jax.checkpoint
def rescale(x: Array, inverse: Array, scale: Array | None, bias: Array | None) -> Array:
    """Returns x · inverse · scale + bias in the statistics' dtype; its gradient keeps x alone.

    `inverse` and `scale` are multiplied first: they are small where x is large.
    """
    slope = inverse if scale is None else inverse * scale
    return affine(x.astype(statistics_dtype(x.dtype)), slope, bias)


@jax.checkpoint  # the gradient makes x − shift again from x
def _shift_and_scale(x: Array, shift: Array, slope: Array, offset: Array) -> Array:
    return (x.astype(statistics_dtype(x.dtype)) - shift) * slope + offset


def rsqrt_or_zero(x: Array) -> Array:
    """Returns 1/√x, and 0 with a derivative of 0 where x is not above 0."""
    positive = x > 0
    return jnp.where(positive, jax.lax.rsqrt(jnp.where(positive, x, 1)), 0)


def affine(y: Array, scale: Array | None, bias: Array | None) -> Array:
    """Returns y · scale + bias, either of which may be absent."""
    if scale is not None:
        y = y * scale
    if bias is not None:
        y = y + bias
    return y


def ema(old: Array, new: Array, momentum: float | Array) -> Array:
    """Returns momentum·old + (1 − momentum)·new, in old's dtype."""
    return (momentum * old + (1 - momentum) * new).astype(old.dtype)


def debiased_momentum(momentum: float, count: Array) -> Array | float:
    """Returns the momentum of the `count`-th update (from 1) of an average free of its start.

    Dividing the average h of zero-started updates by 1 − momentum^count (Kingma & Ba 2014,
    arXiv:1412.6980, section 3) is averaging with momentum 1 − (1 − momentum)/(1 − momentum^count):
    none at first, so that after one update the average is the batch's.
    """
    if momentum in (0, 1):
        return momentum
    later = 1 - (1 - momentum) / -jnp.expm1(count * math.log(momentum))
    return jnp.where(count > 1, later, 0)  # exactly: the start may be far from the first value


# Masks -------------------------------------------------------------------------------------------


def expand_mask(mask: Array | None, shape: tuple[int, ...]) -> Array | None:
    """Returns the mask [N] or [N, ...] (no channels) as bool of the rank of x, axes of 1 added.

    Raises ValueError if its shape is not how `shape`, of x [N, ..., C], begins.
    """
    if mask is None:
        return None
    if not 0 < mask.ndim < len(shape) or mask.shape != shape[: mask.ndim]:
        raise ValueError(
            f"mask of shape {mask.shape} does not fit values of shape {shape}: "
            "it is [N] or [N, ...], without channels"
        )
    return mask.astype(bool).reshape(*mask.shape, *[1] * (len(shape) - mask.ndim))


def finite_where_masked(x: Array, mask: Array | None) -> Array:
    """Returns x with 0 for what is masked and not finite: padding of any content stays harmless."""
    if mask is None:
        return x
    return jnp.where(mask | jnp.isfinite(x), x, 0)
