"""How a batch is divided: into microbatches, and each of them over the devices.

Arithmetic alone: where the rows are put is `parallel`'s.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from normlab.errors import UserError


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the rows of a batch lie: in microbatches, each spread evenly over the devices."""

    microbatches: int
    examples: int  # of a microbatch
    rows: int  # of a microbatch, those of padding included
    replicas: int | None  # devices under pmap, whose axis stands before a replica's rows

    @property
    def padded(self) -> bool:
        """True if some rows are padding and so masked."""
        return self.rows > self.examples

    def check_ghosts(self, ghost_size: int) -> None:
        """Raises ValueError if groups of `ghost_size` are no whole number of a replica's rows.

        Nor a replica's rows a whole number of groups.
        """
        assert self.replicas is not None
        rows = self.rows // self.replicas
        span = ghost_size // rows
        if rows % ghost_size and (ghost_size % rows or self.replicas % span):
            raise ValueError(
                f"groups of {ghost_size} examples do not fit {self.replicas} devices of {rows}"
            )


def split_batch(config: ConfigDict, devices: int, replicated: bool) -> Layout:
    """Returns how the config's batch lies on so many devices, `replicated` under pmap.

    A padded microbatch is a multiple of the ghost size, too: what is padding fills groups of its
    own. Raises UserError, with the arithmetic, for a batch that cannot be split.
    """
    size, parts, count = config.train.batch_size, config.train.microbatches, devices
    replicas = count if replicated else None
    if parts < 1 or size % parts:
        legal = [n for n in range(1, size + 1) if size % n == 0]
        nearest = min(legal, key=lambda n: abs(n - parts))
        raise UserError(
            f"config field 'train.microbatches' = {parts} does not divide the batch of {size}; "
            f"nearest: {nearest}"
        )
    examples = size // parts
    scope = config.batch_stats
    ghost = scope.ghost_size if scope.scope == "ghost" and scope.ghost_size else 1
    if config.parallel.pad_batch:
        multiple = math.lcm(count, ghost)
        rows = -(-examples // multiple) * multiple
        return Layout(parts, examples, rows, replicas)
    if examples % count:
        whole = parts * count
        below = size - size % whole
        choices = " or ".join(str(n) for n in (below, below + whole) if n)
        over = f"{parts} microbatches on {count}" if parts > 1 else f"{count}"
        raise UserError(
            f"config field 'train.batch_size' = {size} does not split over {over} devices "
            f"({size} / {whole} = {size / whole:g}); nearest: {choices}, "
            "or parallel.pad_batch=true"
        )
    return Layout(parts, examples, examples, replicas)


def over_parts(function: Callable[[Any], Any], parts: Any, count: int, add: Any) -> Any:
    """Returns `add(... add(add(zero, function(part)), ...)` over `count` parts, one after another.

    Arrays of `parts` are [count, ...], but for scalars (random keys), of which each part gets its
    own. The zero has 0, and True for booleans. A part starts when the one before it has ended, so
    that one part's memory is all there is.
    """

    def part(index: Any) -> Any:
        def of(array: Array) -> Array:
            if array.ndim:
                return array[index]
            return jax.random.fold_in(array, index)

        return jax.tree.map(of, parts)

    shapes = jax.eval_shape(lambda: function(part(0)))
    zero = jax.tree.map(
        lambda s: jnp.ones(s.shape, s.dtype) if s.dtype == bool else jnp.zeros(s.shape, s.dtype),
        shapes,
    )
    if jax.default_backend() != "cpu":  # where a loop is no slower than its steps
        return jax.lax.fori_loop(0, count, lambda i, total: add(total, function(part(i))), zero)
    total = zero
    for index in range(count):
        total, here = jax.lax.optimization_barrier((total, part(index)))
        total = add(total, function(here))
    return total
