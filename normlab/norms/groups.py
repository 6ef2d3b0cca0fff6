"""Which examples share a batch statistic: the scope of batch normalization.

Groups are consecutive in the order of the global batch. `global` is one group over everything,
`device` one a device, `ghost` one for each k consecutive examples (Hoffer et al. 2017,
arXiv:1705.08741), which may lie within a device or span several of them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from normlab.norms.functional import Moments, moments, pool_moments, psum_moments

SCOPES = ("global", "device", "ghost")


@dataclasses.dataclass(frozen=True)
class Grouping:
    """How a local batch is grouped, and over which devices the groups are pooled."""

    num_groups: int  # groups within the local batch
    axis_name: str | None = None  # devices that take part, under pmap or shard_map
    pooled: bool = False  # statistics are pooled over devices
    index_groups: list[list[int]] | None = None  # devices pooled together; None: all of them


def make_grouping(
    scope: str,
    batch_size: int,
    *,
    ghost_size: int | None = None,
    device_groups: int = 1,
    axis_name: str | None = None,
) -> Grouping:
    """Returns the grouping of a local batch of `batch_size` examples.

    Raises ValueError for an unknown scope and for groups that do not divide the batch.
    """
    if scope == "global":
        return Grouping(1, axis_name, pooled=axis_name is not None)
    if scope == "device":
        _check_divides(device_groups, batch_size, "device groups")
        return Grouping(device_groups, axis_name)
    if scope != "ghost":
        raise ValueError(f"stats_scope {scope!r} is none of {', '.join(SCOPES)}")
    if ghost_size is None or ghost_size < 1:
        raise ValueError(f"stats_scope 'ghost' needs ghost_size of 1 or more, not {ghost_size}")
    if ghost_size <= batch_size or axis_name is None:
        if batch_size % ghost_size:
            raise ValueError(f"ghost_size {ghost_size} does not divide the batch of {batch_size}")
        return Grouping(batch_size // ghost_size, axis_name)
    devices = jax.lax.axis_size(axis_name)
    span, rest = divmod(ghost_size, batch_size)
    if rest or devices % span:
        raise ValueError(
            f"ghost_size {ghost_size} does not divide {devices} devices of {batch_size} examples"
        )
    index_groups = [list(range(first, first + span)) for first in range(0, devices, span)]
    return Grouping(1, axis_name, pooled=True, index_groups=index_groups)


def _check_divides(groups: int, batch_size: int, what: str) -> None:
    if batch_size % groups:
        raise ValueError(f"{groups} {what} do not divide the batch of {batch_size}")


def grouping_of(module: nn.Module, batch_size: int) -> Grouping:
    """Returns the grouping that a module's scope fields ask for; no collectives while it is made."""
    return make_grouping(
        module.stats_scope,
        batch_size,
        ghost_size=module.ghost_size,
        device_groups=module.device_groups,
        axis_name=None if module.is_initializing() else module.axis_name,
    )


def sow_moments(module: nn.Module, groups: Moments, grouping: Grouping) -> None:
    """Leaves the moments [C] of the whole batch in the collection `batch_moments`, if asked for."""
    if module.is_mutable_collection("batch_moments"):
        total = whole_batch(groups, grouping)
        module.sow("batch_moments", "moments", total, reduce_fn=lambda _, new: new)


def group_moments(x: Array, mask: Array | None, grouping: Grouping) -> Moments:
    """Returns each group's moments per channel: x [N, ..., C] -> Moments of [G, 1, ..., 1, C].

    `mask` has x's rank (`expand_mask`). The result of G groups is broadcast against `split(x, G)`.
    """
    x = split(x, grouping.num_groups)
    mask = None if mask is None else split(mask, grouping.num_groups)
    local = moments(x, tuple(range(1, x.ndim - 1)), mask)
    if not grouping.pooled:
        return local
    assert grouping.axis_name is not None
    return psum_moments(local, grouping.axis_name, grouping.index_groups)


def split(x: Array, num_groups: int) -> Array:
    """Returns x [N, ..., C] as [G, N/G, ..., C]."""
    return x.reshape(num_groups, x.shape[0] // num_groups, *x.shape[1:])


def whole_batch(groups: Moments, grouping: Grouping) -> Moments:
    """Returns the moments [C] of the whole batch, over all groups and devices."""
    total = pool_moments(groups, (0,))
    everywhere = grouping.pooled and grouping.index_groups is None
    if grouping.axis_name is not None and not everywhere:
        # Groups that span devices stand on each of them: all counts grow alike, no weight changes.
        total = psum_moments(total, grouping.axis_name)
    channels = total.mean.shape[-1]
    return jax.tree.map(lambda part: jnp.broadcast_to(part.reshape(-1), (channels,)), total)


def average_over_groups(values: Array, valid: Array, grouping: Grouping) -> tuple[Array, Array]:
    """Returns ([C] mean of the valid groups' values with equal weight, [C] is there any).

    `values`, `valid`: [G, 1, ..., 1, C].
    """
    axes = tuple(range(values.ndim - 1))
    total = jnp.sum(jnp.where(valid, values, 0), axes)
    count = jnp.sum(valid, axes, dtype=values.dtype)
    if grouping.axis_name is not None:
        total, count = jax.lax.psum((total, count), grouping.axis_name)
    return total / jnp.maximum(count, 1), count > 0
