"""The compiled programs of a process's latest configs, for runs that differ in their seed alone.

A seed is an argument of every program (`parallel.seed_array`), so what one run has traced and
compiled the next takes as it is: the same program, and the same numbers. A data set may grow
between two runs, so what a program follows from are the config and what the data are. Imports no
jax.
"""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from normlab.config import flatten

if TYPE_CHECKING:
    from normlab.data import DatasetInfo
    from normlab.run_length import RunLength

Compiled = dict[Any, Callable[..., Any]]
"""What a `parallel.Compiler` has compiled."""


class Programs:
    """The programs of the configs that a process trained last."""

    def __init__(self, most: int = 16) -> None:
        """Keeps those of `most` configs."""
        self._most = most
        self._kept: dict[str, Compiled] = {}
        self._turn = threading.Lock()

    def of(self, config: ConfigDict, info: "DatasetInfo", length: "RunLength") -> Compiled:
        """Returns the programs of a config, whatever its seed, on such data, to be added to."""
        fields = {name: value for name, value in flatten(config).items() if name != "seed"}
        key = repr((sorted(fields.items()), info, length))
        with self._turn:
            found = self._kept.pop(key, {})
            self._kept[key] = found  # the latest is last
            while len(self._kept) > self._most:
                del self._kept[next(iter(self._kept))]
        return found
