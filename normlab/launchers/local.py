"""Processes of this machine."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from normlab import pool, ways
from normlab.errors import UserError, unknown
from normlab.sweep import Plan


@dataclasses.dataclass(frozen=True)
class Local:
    """The pool of worker processes (`normlab.pool`)."""

    seeds: str = "auto"  # how runs share the machine: auto (measured), loop, processes, devices

    def __post_init__(self) -> None:
        """Raises UserError for an unknown way."""
        if self.seeds not in ways.WAYS:
            raise unknown("way of the launcher 'local':", self.seeds, ways.WAYS)

    def __call__(
        self,
        plan: Plan,
        folder: Path,
        jobs: int | None,
        threads: int,
        on_event: Callable[[pool.Event], None],
    ) -> dict[str, str]:
        """Runs what is not done; returns {run id: state}.

        Raises UserError for a number of `jobs` beside a way that is not processes.
        """
        if jobs is not None and self.seeds in ("loop", "devices"):
            raise UserError(f"--jobs={jobs} are processes, --launcher=local:seeds={self.seeds} not")
        return pool.run_plan(plan, folder, jobs, threads, on_event, self.seeds)
