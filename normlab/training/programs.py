"""The compiled programs of a process's latest configs, for runs that differ in their seed alone.

A seed is an argument of every program (`parallel.seed_array`), so what one run has traced and
compiled the next takes as it is: the same program, and the same numbers. Imports no jax.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from normlab.config import flatten

Compiled = dict[Any, Callable[..., Any]]
"""What a `parallel.Compiler` has compiled."""


class Programs:
    """The programs of the configs that a process trained last."""

    def __init__(self, most: int = 16) -> None:
        """Keeps those of `most` configs."""
        self._most = most
        self._kept: dict[str, Compiled] = {}

    def of(self, config: ConfigDict) -> Compiled:
        """Returns the programs of a config whatever its seed, for a compiler to add to."""
        fields = {name: value for name, value in flatten(config).items() if name != "seed"}
        key = repr(sorted(fields.items()))
        found = self._kept.pop(key, {})
        self._kept[key] = found  # the latest is last
        while len(self._kept) > self._most:
            del self._kept[next(iter(self._kept))]
        return found
