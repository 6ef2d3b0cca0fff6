"""SIGINT and SIGTERM ask a run to stop: it finishes its step, saves, and leaves with 128 + n."""

import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, signal_number: int, step: int) -> None:
        self.exit_code = 128 + signal_number
        name = signal.Signals(signal_number).name
        super().__init__(f"stopped by {name} at step {step}; the same command resumes it")


class Signals:
    """While entered, notes the first SIGINT or SIGTERM in `received` instead of dying of it.

    A second one acts as it did before. Outside the main thread, where handlers cannot be set, it
    notes nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._saved_at: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
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
