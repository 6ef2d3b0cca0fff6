"""Statistics within one example: what layer, group, instance and RMS normalization share.

An example with nothing unmasked is normalized by its own values, as if it had no mask: it reaches
no other example, and no sum is over nothing. So a mask [N] changes nothing here.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from normlab.norms.functional import (
    Axes,
    Moments,
    blend_moments,
    expand_mask,
    finite_where_masked,
    moments,
    normalize,
    pool_channels,
    rough_mean,
    statistics_dtype,
)
from normlab.norms.normalizer import note_nonfinite

AXES = ("all", "channel")


def check_axes(axes: str) -> None:
    """Raises ValueError unless `axes` is `all` or `channel`."""
    if axes not in AXES:
        raise ValueError(f"axes {axes!r} is none of {', '.join(AXES)}")


def prepare(x: Array, mask: Array | None) -> tuple[Array, Array | None]:
    """Returns x with harmless padding, and the mask [N, ..., 1] where it is of any consequence."""
    mask = expand_mask(mask, x.shape)
    x = finite_where_masked(x, mask)
    if mask is None or math.prod(mask.shape[1:]) == 1:
        return x, None
    return x, mask | ~mask.any(position_axes(x), keepdims=True)


def position_axes(x: Array) -> Axes:
    """Returns the axes of x [N, ..., C] between examples and channels."""
    return tuple(range(1, x.ndim - 1))


def normalize_groups(
    module: nn.Module,
    x: Array,
    num_groups: int,
    mask: Array | None,
    scale: Array | None,
    bias: Array | None,
) -> Array:
    """Returns x [N, ..., C] normalized per example over positions and each group of channels.

    `mask`: from `prepare`; ε is the module's.
    """
    group, shift = group_moments(module, x, num_groups, mask)
    inverse_std = jax.lax.rsqrt(group.var + module.epsilon)
    return normalize(x, group.mean, inverse_std, scale, bias, shift)


def group_moments(
    module: nn.Module, x: Array, num_groups: int, mask: Array | None
) -> tuple[Moments, Array]:
    """Returns each example's moments over positions and groups of channels, and their shift.

    Both [N, 1, ..., 1, C], a group's moments repeated for each of its channels. The moments of
    single channels are pooled, so that the pass over x reduces positions only and channels stay
    side by side in memory.
    """
    shift = rough_mean(x, position_axes(x), mask)
    pooled = pool_channels(moments(x, position_axes(x), mask, shift), num_groups)
    note_nonfinite(module, jnp.isfinite(pooled.var).all())
    return pooled, shift


def weigh_example(x: Array, mask: Array | None, mean: Array, var: Array, weight: float) -> Moments:
    """Returns (1 − weight)·running + weight·own first and second moments, [N, 1, ..., 1, C].

    `mean`, `var`: the running ones [C]; an example's own are over its unmasked positions, and have
    no weight where there is none.
    """
    mask = expand_mask(mask, x.shape)
    own = moments(finite_where_masked(x, mask), position_axes(x), mask)
    mean, var = jnp.broadcast_to(mean, own.mean.shape), jnp.broadcast_to(var, own.var.shape)
    running = Moments(count=jnp.ones_like(mean), mean=mean, var=var)
    return blend_moments(running, own, weight * (own.count > 0))


def standardize_channels(module: nn.Module, x: Array, *, center: bool) -> Array:
    """Returns x [..., C] standardized over its last axis, in the statistics' dtype.

    (x − mean)/√(var + ε) if `center`, else x/√(mean(x²) + ε).
    """
    values = x.astype(statistics_dtype(x.dtype))
    if center:
        # Any constant would do; this one leaves the mean in the range of the deviations.
        values = values - jax.lax.stop_gradient(values[..., :1])
        values = values - _over_channels(_channel_mean(values), x.shape[-1])
    square = _channel_mean(jnp.square(values))
    note_nonfinite(module, jnp.isfinite(square).all())
    inverse_std = jax.lax.rsqrt(square + module.epsilon)
    return values * _over_channels(inverse_std, x.shape[-1])


# A mean over the last axis and its opposite, both as products with a vector of ones: each is the
# other's transpose, so the backward pass is made of them too. XLA's CPU backend has fast loops for
# these and slow ones for a reduction over the fastest axis.


def _channel_mean(x: Array) -> Array:
    """Returns the mean over the last axis: [..., C] -> [...]."""
    ones = jnp.ones(x.shape[-1], x.dtype)
    return jnp.matmul(x, ones, precision=jax.lax.Precision.HIGHEST) / x.shape[-1]


def _over_channels(values: Array, channels: int) -> Array:
    """Returns the values repeated along a new last axis: [...] -> [..., C]."""
    ones = jnp.ones(channels, values.dtype)
    return jnp.tensordot(values, ones, axes=0, precision=jax.lax.Precision.HIGHEST)
