"""Statistics within one example: what layer, group, instance and RMS normalization share.

An example with nothing unmasked is normalized by its own values, as if it had no mask: it reaches
no other example, and no sum is over nothing. So a mask [N] changes nothing here.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from normlab.norms.functional import (
    Axes,
    Moments,
    affine,
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

    Both [N, 1, ..., 1, C], a group's moments repeated for each of its channels, or [N, 1, ..., 1]
    for a single group. The moments of several groups are pooled from those of single channels, so
    that the pass over x reduces positions only and channels stay side by side in memory.
    """
    axes = position_axes(x) if num_groups > 1 else tuple(range(1, x.ndim))
    shift = rough_mean(x, axes, mask, along=1 if axes else None)
    group = moments(x, axes, mask, shift)
    if num_groups > 1:
        group = pool_channels(group, num_groups)
    note_nonfinite(module, jnp.isfinite(group.var).all())
    return group, shift


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


def standardize_channels(
    module: nn.Module, x: Array, scale: Array | None, bias: Array | None, *, center: bool
) -> Array:
    """Returns x [..., C] standardized over its last axis, times scale plus bias [C].

    (x − mean)/√(var + ε) if `center`, else x/√(mean(x²) + ε). In the statistics' dtype.
    """
    values = x.astype(statistics_dtype(x.dtype))
    gain = jnp.ones(x.shape[-1:], values.dtype) if scale is None else scale
    dtype = jnp.promote_types(values.dtype, gain.dtype)
    note_nonfinite(module, jnp.isfinite(_row_moments(values, center)[1]).all())
    y = _standardize_rows(values.astype(dtype), gain.astype(dtype), module.epsilon, center)
    return affine(y, None, bias)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _standardize_rows(x: Array, scale: Array, epsilon: float, center: bool) -> Array:
    """Returns x [..., C] standardized over its last axis, times scale [C].

    The derivative is the textbook's, put so that its transpose, the gradient, keeps only x, mean
    and 1/σ, and is made of what XLA's CPU backend does fast: one product p = x̂·dy, the sum of its
    rows (for the scale) and its product with the scale (for x).
    """
    mean, square = _row_moments(x, center)
    return (x - mean) * jax.lax.rsqrt(square + epsilon) * scale


@_standardize_rows.defjvp
def _standardize_rows_jvp(
    epsilon: float, center: bool, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    x, scale = primals
    mean, square = _row_moments(x, center)
    inverse_std = jax.lax.rsqrt(square + epsilon)
    y = (x - mean) * inverse_std * scale
    return y, _rows_tangent(x, mean, inverse_std, scale, *tangents, center)


@partial(jax.checkpoint, static_argnums=(6,))  # so that x̂ is made again, and not kept
def _rows_tangent(
    x: Array, mean: Array, inverse_std: Array, scale: Array, dx: Array, dscale: Array, center: bool
) -> Array:
    x_hat = (x - mean) * inverse_std
    # Signs stand at the small factors, or each would be a pass over the gradient.
    along = _outer(-inverse_std * (x_hat * dx).mean(-1, keepdims=True), scale)
    tangent = inverse_std * scale * dx + x_hat * (dscale + along)
    if center:
        tangent = tangent + _outer(-inverse_std * dx.mean(-1, keepdims=True), scale)
    return tangent


def _row_moments(x: Array, center: bool) -> tuple[Array, Array]:
    """Returns mean and variance over the last axis, [..., 1], or 0 and the mean square."""
    rows = x.reshape(-1, x.shape[-1])  # XLA would make x − mean once, and keep it, were it not so
    mean = rows.mean(-1, keepdims=True) if center else jnp.zeros((), x.dtype)
    square = jnp.square(rows - mean).mean(-1, keepdims=True)
    shape = (*x.shape[:-1], 1)
    return jnp.broadcast_to(mean, square.shape).reshape(shape), square.reshape(shape)


def _outer(column: Array, row: Array) -> Array:
    """Returns [..., 1] times [C] as a product of matrices, whose transpose is one, too."""
    return jnp.tensordot(column[..., 0], row, axes=0, precision=jax.lax.Precision.HIGHEST)
