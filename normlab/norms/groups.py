"""Which examples share a batch statistic: the scope of batch normalization.

Groups are consecutive in the order of the global batch. `global` is one group over everything,
`device` one a device, `ghost` one for each k consecutive examples (Hoffer et al. 2017,
arXiv:1705.08741), which may lie within a device or span several of them.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from normlab.norms.functional import (
    Axes,
    Moments,
    blend_moments,
    covariance,
    ema,
    expand_mask,
    finite_where_masked,
    masked_mean,
    moments,
    pool_moments,
    psum_moments,
    rough_mean,
)
from normlab.norms.normalizer import AffineNormalizer, note_nonfinite

SCOPES = ("global", "device", "ghost")


@dataclasses.dataclass(frozen=True)
class Grouping:
    """How a local batch is grouped, and over which devices the groups are pooled."""

    num_groups: int  # groups within the local batch
    axis_name: str | None = None  # devices that take part, under pmap or shard_map
    pooled: bool = False  # statistics are pooled over devices
    index_groups: list[list[int]] | None = None  # devices pooled together; None: all of them

    @property
    def everywhere(self) -> bool:
        """True if every device has the moments of the whole batch."""
        return self.axis_name is None or (self.pooled and self.index_groups is None)

    @property
    def span(self) -> int:
        """Devices on which each group stands."""
        return len(self.index_groups[0]) if self.index_groups else 1


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


class BatchNormalizer(AffineNormalizer):
    """Base of the normalizers whose statistics are over groups of examples: the scope's fields.

    `NormFactory` sets them, from `config.batch_stats`.
    """

    stats_scope: str = "global"  # statistics over: global, device, ghost
    ghost_size: int | None = None  # examples in a group of scope ghost
    axis_name: str | None = None  # device axis under pmap or shard_map
    device_groups: int = 1  # groups of scope device under jit

    averages_groups: ClassVar[bool] = True


class WholeBatchNormalizer(AffineNormalizer):
    """Base of those whose statistics are over the whole batch and past ones, whatever its groups.

    `NormFactory` sets the field.
    """

    axis_name: str | None = None  # device axis under pmap or shard_map


def whole_batch(module: WholeBatchNormalizer) -> Grouping:
    """Returns the one group of the whole batch, over all devices that hold it."""
    if module.is_initializing():
        return Grouping(1)
    return Grouping(1, module.axis_name, pooled=module.axis_name is not None)


def summed_over_devices(axis_name: str | None, value: Array) -> Array:
    """Returns the sum of the devices' values; without an axis, the value."""
    return value if axis_name is None else jax.lax.psum(value, axis_name)


def grouping_of(module: BatchNormalizer, batch_size: int) -> Grouping:
    """Returns the grouping that a module's scope fields ask for.

    While variables are made there is one group: a dummy batch of any size will do, and no axis.
    """
    if module.is_initializing():
        return Grouping(1)
    return make_grouping(
        module.stats_scope,
        batch_size,
        ghost_size=module.ghost_size,
        device_groups=module.device_groups,
        axis_name=module.axis_name,
    )


def split(x: Array, num_groups: int) -> Array:
    """Returns x [N, ..., C] as [G, N/G, ..., C]."""
    return x.reshape(num_groups, x.shape[0] // num_groups, *x.shape[1:])


@dataclasses.dataclass(frozen=True)
class GroupedBatch:
    """A batch split into groups, and each group's moments per channel, [G, 1, ..., 1, C]."""

    values: Array  # [G, N/G, ..., C]
    shift: Array  # a constant near each group's mean: see `functional`
    moments: Moments
    local: Moments  # this device's part of the moments
    grouping: Grouping
    axes: Axes  # of the values that share a statistic: examples, and positions unless kept apart
    mask: Array | None  # [G, N/G, ..., 1] true where a value counts; so groups may be empty

    def unless_empty(self, statistic: Array, running: Array) -> Array:
        """Returns a group's own statistic, or the running one for a group of nothing.

        statistic: [G, 1, ..., 1, C], running: [C], or both of any other last length.
        """
        return statistic if self.mask is None else jnp.where(self.present, statistic, running)

    @property
    def present(self) -> Array:
        """[G, 1, ..., 1, 1], true where a group has values: no mask has channels, so in all."""
        return self.moments.count[..., :1] > 0

    def mean_of(self, values: Array) -> Array:
        """Returns each group's mean of `values` [G, N/G, ...], unmasked and over its devices."""
        mean = masked_mean(values, self.axes, self.mask)
        if not self.grouping.pooled:
            return mean
        assert self.grouping.axis_name is not None
        weight = self.local.count / jnp.maximum(self.moments.count, 1)
        return jax.lax.psum(
            weight[..., :1] * mean,
            self.grouping.axis_name,
            axis_index_groups=self.grouping.index_groups,
        )

    def mean_over_groups(self, per_group: Array) -> Array:
        """Returns the mean [] of what groups [G, 1, ..., 1, C] have, on all devices.

        Groups of nothing do not count.
        """
        if self.mask is None and self.grouping.axis_name is None:
            return jnp.mean(per_group)
        axis_name, there = self.grouping.axis_name, jnp.broadcast_to(self.present, per_group.shape)
        total = summed_over_devices(axis_name, jnp.sum(jnp.where(there, per_group, 0)))
        return total / jnp.maximum(summed_over_devices(axis_name, jnp.sum(there)), 1)

    def whole(self) -> Moments:
        """Returns the moments [C] of the whole batch, over all groups and devices."""
        total = pool_moments(self.local, (0, *self.axes))
        if self.grouping.axis_name is not None:
            total = psum_moments(total, self.grouping.axis_name)
        return jax.tree.map(lambda part: part.reshape(part.shape[len(self.axes) + 1 :]), total)


def group_batch(
    module: nn.Module,
    x: Array,
    mask: Array | None,
    *,
    positions_apart: bool = False,
    grouping: Grouping | None = None,
    covariance_of: int | None = None,
) -> GroupedBatch:
    """Returns x [N, ..., C] in the groups that a module's scope fields ask for, or in `grouping`.

    `positions_apart`: a statistic is over examples only, one for each position and channel. The
    moments have the covariance of groups of `covariance_of` channels, if that is given.
    """
    mask = expand_mask(mask, x.shape)
    if grouping is None:
        assert isinstance(module, BatchNormalizer)
        grouping = grouping_of(module, x.shape[0])
    values = split(finite_where_masked(x, mask), grouping.num_groups)
    axes = (1,) if positions_apart else tuple(range(1, values.ndim - 1))
    if mask is not None:
        mask = split(mask, grouping.num_groups)
    shift = rough_mean(values, axes, mask)
    local = moments(values, axes, mask, shift)
    if covariance_of is not None:
        local = local.replace(covariance=covariance(values, local.mean, mask, covariance_of))
    together = local
    if grouping.pooled:
        assert grouping.axis_name is not None
        together = psum_moments(local, grouping.axis_name, grouping.index_groups)
    return GroupedBatch(values, shift, together, local, grouping, axes, mask)


def gathers_moments(module: nn.Module) -> bool:
    """True in a pass that gathers the moments of a data set (`sow_moments`)."""
    return module.is_mutable_collection("batch_moments") and not module.is_initializing()


def sow_moments(module: nn.Module, batch: GroupedBatch) -> None:
    """Leaves the moments [C] of the whole batch in the collection `batch_moments`, if asked for."""
    if gathers_moments(module):
        module.sow("batch_moments", "moments", batch.whole(), reduce_fn=lambda _, new: new)


def moving_averages(
    module: nn.Module,
    old: dict[str, Array],
    new: dict[str, Array],
    batch: GroupedBatch,
    momentum: float | Array,
) -> tuple[dict[str, Array], Array]:
    """Returns the running statistics after a batch, and whether they moved (boolean []).

    `old`: [C]; `new`, of the batch's groups: [G, 1, ..., 1, C], or both with positions, or of any
    other last length. The groups that have values enter with equal weight. Nothing moves where
    there is none, and nothing at all if any of their statistics is not finite: one overflow in one
    batch would otherwise poison an average for good.
    """
    grouping, axes = batch.grouping, (0, *batch.axes)

    def total(per_group: Array) -> Array:
        summed = per_group.sum(axes)
        if grouping.everywhere:
            return summed
        assert grouping.axis_name is not None
        # A group that spans devices stands on each of them: all weights grow alike.
        return jax.lax.psum(summed, grouping.axis_name)

    groups = total(batch.present.astype(batch.moments.count.dtype))
    means = {
        name: total(jnp.where(batch.present, value, 0)) / jnp.maximum(groups, 1)
        for name, value in new.items()
    }
    finite = all_finite(module, means)
    averages = {
        name: jnp.where((groups > 0) & finite, ema(old[name], mean, momentum), old[name])
        for name, mean in means.items()
    }
    return averages, (groups > 0).any() & finite


def moving_moments(
    module: nn.Module, mean: Array, var: Array, batch: GroupedBatch, momentum: float | Array
) -> tuple[Array, Array, Array]:
    """Returns mean and variance [C] after a batch, and whether they moved (boolean []).

    What is averaged are the first and second moments of the whole batch: so the variance holds the
    spread of the batches' means too, as one over the data set does.
    """
    total = batch.whole()
    old = Moments(count=jnp.ones_like(mean), mean=mean, var=var)
    new = blend_moments(old, total, 1 - momentum)
    finite = all_finite(module, {"mean": total.mean, "var": total.var})
    moves = (total.count > 0).any() & finite
    mean_after, var_after = (
        jnp.where(moves, after.astype(before.dtype), before)
        for after, before in ((new.mean, mean), (new.var, var))
    )
    return mean_after, var_after, moves


def all_finite(
    module: nn.Module, statistics: dict[str, Array], axis_name: str | None = None
) -> Array:
    """Returns whether all statistics are finite (boolean []), and says so where asked for.

    `axis_name`: devices that have each its own part of them.
    """
    finite = jnp.all(jnp.stack([jnp.isfinite(value).all() for value in statistics.values()]))
    if axis_name is not None:
        finite = jax.lax.psum((~finite).astype(jnp.int32), axis_name) == 0
    note_nonfinite(module, finite)
    return finite
