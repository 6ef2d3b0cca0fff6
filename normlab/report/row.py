"""What a report is made of: a row is a planned run under a setting, a sweep all of a folder."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from normlab.report.claim import Claim
from normlab.report.files import read_series

STATES = ("done", "diverged", "failed", "interrupted", "running", "planned")
"""A run's state is its status.json's, `planned` if it has no folder yet."""

MEASURED = ("done", "diverged")
"""States whose final accuracy, if there is one, counts: a diverged run's does, or a normalizer
that diverges now and then would be judged by its lucky seeds."""


@dataclass(frozen=True)
class Row:
    """One planned run under one setting."""

    setting: str
    norm: str
    seed: int | None
    id: str
    path: Path
    state: str = "planned"  # one of STATES
    step: int | None = None  # optimizer steps done when the status was last written
    message: str = ""  # the run's own last word, one line
    labels: Mapping[str, str] = field(default_factory=dict)  # labels beyond setting, norm, seed
    tuned: str = ""  # a candidate among several, of which the cell shows the best: base_lr=0.1
    shared_with: str = ""  # the earlier setting that has the very same run, if any
    result: Mapping[str, float | str] = field(default_factory=dict)  # result.json's finite numbers
    curve: tuple[tuple[int, float], ...] = ()  # (steps, test accuracy as a fraction), by step
    seconds: tuple[float, ...] = ()  # of training, up to each point of the curve; () if not known
    steps_per_epoch: int | None = None
    probe: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)  # percentiles
    config: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)  # commit, versions, devices, ...
    pairing: Mapping[str, str] = field(default_factory=dict)  # what runs of one seed share: hashes
    started: str = ""  # UTC, ISO 8601
    notes: tuple[str, ...] = ()  # faults of the run's files, one line each

    def series(self, split: str) -> dict[str, tuple[tuple[int, float], ...]]:
        """Returns the numbers in metrics.jsonl's lines of a split: {name: (step, value), by step}.

        Read when asked for: the lines of layers and of signals are many.
        """
        return read_series(self.path / "metrics.jsonl", split)

    def number(self, name: str) -> float | None:
        """Returns the run's final metric `name`, None if it was not measured or is not finite."""
        value = self.result.get(name)
        return None if isinstance(value, str) else value


@dataclass(frozen=True)
class Choice:
    """Which of several candidates a cell shows: the best on the validation split."""

    tuned: str  # e.g. base_lr=0.1
    means: Mapping[str, float | None]  # mean validation accuracy over seeds of each candidate
    counts: Mapping[str, int]  # how many seeds that is


@dataclass(frozen=True)
class Sweep:
    """All rows of a folder, in the order of the plan."""

    directory: Path
    title: str  # the config the runs come from
    command: str  # that made them, "" if unknown
    settings: Mapping[str, Mapping[str, Any]]  # setting -> the config fields it overrides
    norms: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]  # faults of the folder as a whole
    overrides: Mapping[str, Any] = field(default_factory=dict)  # of all runs, by the command line
    claim: Claim | None = None  # of the paper, if the sweep is an experiment's
    chosen: Mapping[tuple[str, str], Choice] = field(default_factory=dict)  # of tuned cells
    interval: str = "t"  # of all means and differences: one of statistics.INTERVALS

    def cell(self, setting: str, norm: str) -> tuple[Row, ...]:
        """Returns the rows of one cell of the table: all its seeds, at the candidate chosen."""
        choice = self.chosen.get((setting, norm))
        return tuple(
            row
            for row in self._cells.get((setting, norm), ())
            if choice is None or row.tuned == choice.tuned
        )

    @cached_property
    def _cells(self) -> dict[tuple[str, str], list[Row]]:
        """The rows by setting and normalizer: every table and figure asks for each cell."""
        cells: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            cells.setdefault((row.setting, row.norm), []).append(row)
        return cells

    def runs(self) -> tuple[Row, ...]:
        """Returns each run once, however many settings share it."""
        return tuple({row.id: row for row in reversed(self.rows)}.values())[::-1]


def measured(rows: Iterable[Row], metric: str) -> list[float]:
    """Returns the final metric of the rows that ended with a measurement."""
    values = (row.number(metric) for row in rows if row.state in MEASURED)
    return [value for value in values if value is not None]


def digest(sweep: Sweep) -> str:
    """Returns 12 hex digits of the rows that a verdict rests on."""
    rows = [
        (
            *(row.setting, row.norm, row.tuned, row.seed, row.id, row.state),
            *(dict(row.result), dict(row.pairing), row.curve, dict(row.probe)),
        )
        for row in sweep.rows
    ]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:12]
