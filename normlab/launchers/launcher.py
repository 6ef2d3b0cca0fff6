"""What a launcher is."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from normlab.pool import Event
from normlab.sweep import Plan


@dataclasses.dataclass(frozen=True)
class Rendered:
    """What a launcher leaves that runs nothing itself."""

    path: Path
    advice: str  # what to type now, and afterwards; may have several lines


class Launcher(Protocol):
    """Runs what a plan has left to do, as `pool.run_plan` does on this machine."""

    def __call__(
        self,
        plan: Plan,
        folder: Path,
        jobs: int | None,
        threads: int,
        on_event: Callable[[Event], None],
    ) -> dict[str, str] | Rendered:
        """Returns {run id: state} of every run of the plan, or what it wrote instead of running.

        `jobs` is how many runs may go at a time (None: as many as the launcher thinks fit),
        `threads` how many CPU threads each has, which decides the last bits of its numbers.
        `on_event` is called from one thread at a time. To be called from the main thread. Raises
        UserError and MachineFault.
        """
        ...
