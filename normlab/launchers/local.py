"""Processes of this machine."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from normlab import pool
from normlab.sweep import Plan


@dataclasses.dataclass(frozen=True)
class Local:
    """The pool of worker processes (`normlab.pool`); no options."""

    def __call__(
        self,
        plan: Plan,
        folder: Path,
        jobs: int | None,
        threads: int,
        on_event: Callable[[pool.Event], None],
    ) -> dict[str, str]:
        """Runs what is not done; returns {run id: state}."""
        return pool.run_plan(plan, folder, jobs, threads, on_event)
