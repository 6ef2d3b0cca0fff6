"""Statistics within one example: what layer, group, instance and RMS normalization share."""

import jax.numpy as jnp
from jax import Array

from normlab.norms.functional import Axes, Moments, moments, pool_moments

AXES = ("all", "channel")


def example_axes(ndim: int, axes: str) -> Axes:
    """Returns the axes of x [N, ..., C] that `all` or `channel` means; raises ValueError else."""
    if axes == "all":
        return tuple(range(1, ndim))
    if axes == "channel":
        return (ndim - 1,)
    raise ValueError(f"axes {axes!r} is none of {', '.join(AXES)}")


def known_moments(x: Array, axes: Axes, mask: Array | None) -> Moments:
    """Returns the moments over `axes`; mean 0 and variance 1 where nothing is unmasked."""
    return _known(moments(x, axes, mask), mask)


def channel_group_moments(x: Array, num_groups: int, mask: Array | None) -> Moments:
    """Returns the moments of each channel's group: x [N, ..., C] -> Moments of [N, 1, ..., C].

    The moments of single channels are pooled by the law of total variance, so that the pass over x
    reduces positions only and channels stay side by side in memory.
    """
    if x.ndim == 2:  # one position: a channel's own variance is zero, the group's is not
        x, mask = x[:, None, :], None if mask is None else mask[:, None, :]
        stats = channel_group_moments(x, num_groups, mask)
        return Moments(*(part[:, 0] for part in (stats.count, stats.mean, stats.var)))
    channels = x.shape[-1]
    single = moments(x, tuple(range(1, x.ndim - 1)), mask)
    grouped = Moments(
        *(
            part.reshape(*part.shape[:-1], num_groups, channels // num_groups)
            for part in (single.count, single.mean, single.var)
        )
    )
    pooled = pool_moments(grouped, (-1,))
    per_channel = Moments(
        *(
            jnp.broadcast_to(part, member.shape).reshape(single.mean.shape)
            for part, member in (
                (pooled.count, grouped.count),
                (pooled.mean, grouped.mean),
                (pooled.var, grouped.var),
            )
        )
    )
    return _known(per_channel, mask)


def _known(stats: Moments, mask: Array | None) -> Moments:
    if mask is None:
        return stats
    return stats.replace(var=jnp.where(stats.count > 0, stats.var, 1))
