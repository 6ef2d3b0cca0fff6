"""Runs as they are now, looked at again and again: each look reads what was written since the last.

Writes nothing and holds no lock. A log may be cut off in its last line, cut back by a resumed run,
or gone with its folder; each of these is a state and no error.
"""

import contextlib
import dataclasses
import json
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from normlab import run
from normlab.errors import UserError
from normlab.report.files import RUN_ID, integer, number, one_line, plain_text, read_json

LARGEST_LOOK = 2**26  # bytes of a log that are read at once
RECENT = 20  # lines of timing.jsonl over which the speed is taken


@dataclasses.dataclass
class Log:
    """A file of JSON lines, and how far it has been read."""

    path: Path
    offset: int = 0
    changed: float = 0.0  # when it was last written, seconds since the epoch

    def news(self) -> Iterator[tuple[bool, list[bytes]]]:
        """Yields what `read_on` returns until nothing is new."""
        lines = [b""]
        while lines:
            anew, lines = self.read_on()
            yield anew, lines

    def read_on(self) -> tuple[bool, list[bytes]]:
        """Returns (has it begun anew, its new whole lines); the last one may still be written."""
        try:
            there = os.stat(self.path)
            if not stat.S_ISREG(there.st_mode):  # a pipe would hold up whoever opens it
                return False, []
            if there.st_size == self.offset:
                return False, []
            self.changed = there.st_mtime
            with self.path.open("rb") as file:
                file.seek(max(self.offset - 1, 0))
                data = file.read(LARGEST_LOOK)
        except OSError:
            there, data = None, b""
        # What was read ended a line; if nothing does there, the file was cut back in between.
        anew = self.offset > 0 and not data.startswith(b"\n")
        if anew:
            self.offset = 0
            return True, self.read_on()[1] if there else []
        lines = data[1 if self.offset else 0 : data.rfind(b"\n") + 1]
        self.offset += len(lines)
        return False, lines.split(b"\n")[:-1]


@dataclasses.dataclass
class LiveRun:
    """A run as far as it has been read."""

    folder: Path
    norm: str = ""
    setting: str = ""
    seed: int | None = None
    state: str = "planned"
    step: int = 0
    num_steps: int | None = None
    status: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    status_written: float = 0.0  # seconds since the epoch; 0 if there is none
    train_loss: float | None = None
    validation_accuracy: float | None = None
    test_accuracies: list[float] = dataclasses.field(default_factory=list)
    times: deque[Mapping[str, Any]] = dataclasses.field(
        default_factory=lambda: deque(maxlen=RECENT)
    )

    def __post_init__(self) -> None:
        self.metrics = Log(self.folder / "metrics.jsonl")
        self.timing = Log(self.folder / "timing.jsonl")

    @property
    def test_accuracy(self) -> float | None:
        """The latest; None before the first."""
        return self.test_accuracies[-1] if self.test_accuracies else None

    @property
    def steps_per_second(self) -> float | None:
        """Over the latest lines, all but compilation included; None if nobody can tell."""
        if not self.times:
            return None
        first, last = self.times[0], self.times[-1]
        steps, seconds = last["step"] - first["step"], last["seconds"] - first["seconds"]
        if steps == 0:  # the first lines of a run: at one step
            steps, seconds = last["step"], last["train_seconds"]
        return steps / seconds if steps > 0 and seconds > 0 else None

    def seconds_left(self, now: float) -> float | None:
        """Returns how long the run takes from `now` (since the epoch) on; None if unknown."""
        speed = self.steps_per_second
        if self.state != "running" or speed is None or self.num_steps is None:
            return None
        left = (self.num_steps - self.step) / speed - (now - self.timing.changed)
        return max(left, 0.0)


class Watched:
    """The runs of a folder: of a run, of a sweep (sweep.json), or of run folders."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runs: list[LiveRun] = []

    def look(self) -> list[LiveRun]:
        """Reads what is new; returns the runs in the order of the plan, or of their folders' names.

        Raises UserError, one line, if the folder does not exist or holds no run.
        """
        known = {live.folder: live for live in self.runs}
        self.runs = [known.get(live.folder, live) for live in _find(self.directory)]
        for live in self.runs:
            refresh(live)
        return self.runs

    def is_worked_on(self) -> bool:
        """True while a run is running, or a process holds the sweep or a run that has no status."""
        running = any(live.state == "running" for live in self.runs)
        starting = (live.folder for live in self.runs if live.state == "planned")
        return running or any(_held(folder) for folder in (self.directory, *starting))

    def is_over(self) -> bool:
        """True if nothing is running, or planned in a sweep."""
        planned = any(live.state == "planned" for live in self.runs)
        in_sweep = (self.directory / run.SWEEP).exists()
        return not (planned and in_sweep) and not self.is_worked_on()


def _find(directory: Path) -> Iterable[LiveRun]:
    if not directory.is_dir():
        what = "is not a folder" if directory.exists() else "does not exist"
        raise UserError(f"folder {str(directory)!r} {what}")
    entries = read_json(directory / run.SWEEP, []).get("runs")
    if isinstance(entries, list) and entries:
        return _planned(directory, entries)
    if _is_run(directory):
        return [LiveRun(directory)]
    folders = [path for path in sorted(directory.iterdir()) if _is_run(path)]
    if not folders:
        raise UserError(f"folder {str(directory)!r} holds no run")
    return [LiveRun(folder, setting=one_line(folder.name)) for folder in folders]


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "identity.json"))


def _planned(directory: Path, entries: list[Any]) -> Iterable[LiveRun]:
    """Returns the distinct runs of a plan, each under the first of its labels."""
    found: dict[str, LiveRun] = {}
    for entry in entries:
        if not isinstance(entry, dict):
            continue
        run_id, labels = entry.get("id"), entry.get("labels")
        if isinstance(run_id, str) and RUN_ID.fullmatch(run_id) and isinstance(labels, dict):
            tuned = labels.get("tuned")
            tuned = tuned if isinstance(tuned, dict) else {}
            names = [f"{name.rpartition('.')[2]}={plain_text(x)}" for name, x in tuned.items()]
            live = LiveRun(
                directory / run_id,
                norm=one_line(labels.get("norm", "")),
                setting=one_line(", ".join([str(labels.get("setting", "base")), *names])),
                seed=integer(labels.get("seed")),
            )
            found.setdefault(run_id, live)
    return found.values()


# One run -----------------------------------------------------------------------------------------


def refresh(live: LiveRun) -> None:
    """Brings a run up to what its folder says now."""
    _read_status(live)
    if not live.norm:
        _read_labels(live)
    for anew, lines in live.metrics.news():
        if anew:
            live.train_loss = live.validation_accuracy = None
            live.test_accuracies = []
        for line in _parsed(lines):
            _take(live, line)
    numbers = ("step", "seconds", "train_seconds")
    for anew, lines in live.timing.news():
        if anew:
            live.times.clear()
        for line in _parsed(lines[-RECENT:]):
            if all(number(line.get(name)) is not None for name in numbers):
                live.times.append(line)
    told = live.times[-1]["step"] if live.times else integer(live.status.get("step"))
    live.step = told or 0


def _read_status(live: LiveRun) -> None:
    path = live.folder / "status.json"
    try:
        written = path.stat().st_mtime
    except OSError:
        written = 0.0
    if written != live.status_written:
        live.status, live.status_written = _read(path), written
        live.num_steps = integer(_read(live.folder / "manifest.json").get("num_steps"))
    state = live.status.get("status", "planned")
    dead = state == "running" and not _held(live.folder, unknown=True)
    live.state = "interrupted" if dead or state not in ("planned", *run.STATES) else state


def _read_labels(live: LiveRun) -> None:
    """Names a run outside a sweep by its config; identity.json is there from its first moment."""
    config = _read(live.folder / "config.json") or _read(live.folder / "identity.json")
    norm = config.get("norm")
    live.norm = one_line(norm.get("kind", "")) if isinstance(norm, dict) else ""
    live.seed = integer(config.get("seed"))


def _take(live: LiveRun, line: Mapping[str, Any]) -> None:
    split, accuracy = line.get("split"), number(line.get("accuracy"))
    if split == "train":
        live.train_loss = number(line.get("loss"))
    elif split == "validation":
        live.validation_accuracy = accuracy
    elif split == "test" and accuracy is not None:
        live.test_accuracies.append(accuracy)


def _parsed(lines: Iterable[bytes]) -> Iterable[dict[str, Any]]:
    """Yields the JSON objects among the lines."""
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, [], required=False)


def _held(folder: Path, unknown: bool = False) -> bool:
    """Returns whether a process holds the folder's lock; `unknown` where that cannot be asked."""
    try:
        return run.is_locked(folder)
    except OSError:
        return unknown
