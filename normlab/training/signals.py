"""A signal asks a run to stop: it finishes its step, saves, and leaves with 128 + n.

SIGINT comes from a terminal, SIGTERM from whoever ends or preempts a job, SIGUSR1 and SIGUSR2 from
a cluster's warning that the time is nearly up (`sbatch --signal`).
"""

import signal
import threading
from types import FrameType
from typing import Any

ASKS_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, signal_number: int, step: int) -> None:
        self.exit_code = 128 + signal_number
        name = signal.Signals(signal_number).name
        super().__init__(f"stopped by {name} at step {step}; the same command resumes it")


class Signals:
    """While entered, notes the first such signal in `received` instead of dying of it.

    A second one acts as it did before. Outside the main thread, where handlers cannot be set, it
    notes nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._saved_at: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in ASKS_TO_STOP:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def saved(self, step: int) -> None:
        """From now on a signal raises Interrupted where it finds the run: all of it is saved."""
        self._saved_at = step

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        if self._saved_at is not None:
            raise Interrupted(number, self._saved_at)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
