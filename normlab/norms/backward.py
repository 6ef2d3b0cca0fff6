"""Statistics of the backward pass as state.

Some normalizers average what only the backward pass knows: means of gradients. Nothing can be
written there, so such a statistic leaves by the one way out that there is. Its entry in
`batch_stats`, named `backward_...`, is an argument of a function with a gradient of its own
(`jax.custom_vjp`), and what that function returns as the entry's cotangent is no derivative but
*the statistic's new value*. Whoever differentiates the loss by these entries gets the new state:

    backward, others = split_state(batch_stats)
    gradient, backward = jax.grad(loss, (0, 1))(params, backward, others)
    batch_stats = join_state(updated, backward)

Who does not differentiate by them leaves them as they are, so evaluation and a forward pass alone
never move them. A module must be called once in a loss: cotangents of two calls would be added.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import traverse_util
from jax import Array

from normlab.norms.groups import GroupedBatch

PREFIX = "backward_"

Paths = dict[tuple[str, ...], Array]


def split_state(batch_stats: Mapping[str, Any]) -> tuple[Paths, dict[str, Any]]:
    """Returns the statistics of the backward pass, by path, and the tree of all others."""
    flat = traverse_util.flatten_dict(dict(batch_stats))
    backward = {path: value for path, value in flat.items() if path[-1].startswith(PREFIX)}
    others = {path: value for path, value in flat.items() if path not in backward}
    return backward, traverse_util.unflatten_dict(others)


def join_state(batch_stats: Mapping[str, Any], backward: Paths) -> dict[str, Any]:
    """Returns the tree with the statistics of the backward pass put in their places."""
    if not backward:
        return dict(batch_stats)
    flat = traverse_util.flatten_dict(dict(batch_stats))
    return traverse_util.unflatten_dict({**flat, **backward})


def kept_unless_finite(
    moved: Array, new: tuple[Array, ...], old: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Returns the new statistics if `moved` (boolean []) and all of them are finite, else the old.

    What is not finite may come from the gradient alone, of which the forward pass knows nothing.
    """
    finite = jnp.all(jnp.stack([jnp.isfinite(value).all() for value in new])) & moved
    return tuple(
        jnp.where(finite, value.astype(before.dtype), before)
        for value, before in zip(new, old, strict=True)
    )


def share_of_mean(batch: GroupedBatch) -> Array:
    """Returns by how much a value moves the mean over its group: 1/m, or 0 where it is masked."""
    share = 1 / batch.moments.count.clip(1)[..., :1]
    return share if batch.mask is None else batch.mask * share
