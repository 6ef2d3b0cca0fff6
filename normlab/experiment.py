"""A paper's claim as one declaration: what it says, what it published, what to run, the verdict.

A file in `experiments/` has one `EXPERIMENT`. It is run at a scale that fits the machine; at a
scale that is not the paper's own setting, its numbers stand beside ours for their order and sign,
not for their value.
"""

import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from normlab.errors import UserError, nearest, unknown
from normlab.grid import Grid, grid, settings, tune
from normlab.report.row import Row, Sweep
from normlab.report.statistics import INTERVALS
from normlab.report.verdict import Hypothesis, Verdict, above, all_of, close

__all__ = [
    "Experiment",
    "Grid",
    "Hypothesis",
    "Measured",
    "Published",
    "Row",
    "Scale",
    "Sweep",
    "Verdict",
    "above",
    "all_of",
    "close",
    "grid",
    "load_experiment",
    "settings",
    "tune",
]

METRICS = ("test_accuracy", "test_error")

VerdictFunction = Callable[[Sweep], Verdict]


@dataclass(frozen=True)
class Measured:
    """A published number in percent, with what was published of its spread."""

    value: float
    std: float | None = None  # over runs
    n: int | None = None  # runs

    def as_json(self) -> dict[str, Any]:
        """Returns the value for sweep.json."""
        return {"value": self.value, "std": self.std, "n": self.n}


Number = float | Measured


@dataclass(frozen=True)
class Published:
    """A table of a paper, in percent."""

    metric: str  # one of METRICS
    rows: Mapping[str, Number | Mapping[Any, Number]]  # norm -> number, or {setting or value: it}
    setting: str  # data, model, length, hardware: what the paper did
    source: str = ""  # table or figure
    sure: str = ""  # how the number is known, and doubts about it
    scales: tuple[str, ...] = ()  # the scales whose setting is this one


@dataclass(frozen=True)
class Scale:
    """How an experiment is run on a machine of a certain size."""

    config: str  # FILE.py[:choices]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    sweep: Grid | None = None  # none: the experiment's
    seeds: int | None = None  # none: the experiment's
    verdict: VerdictFunction | None = None  # none: the experiment's
    cost: str = ""  # e.g. "10 minutes on 2 cores"
    claim: str = ""  # the part of the claim that this scale tests; none: the experiment's


@dataclass(frozen=True)
class Experiment:
    """A claim, and how to test it."""

    claim: str
    paper: Published | tuple[Published, ...]
    scales: Mapping[str, str | Scale]  # smoke, cpu, cifar, paper
    sweep: Grid
    seeds: int
    verdict: VerdictFunction
    interval: str = "t"  # of means and differences, verdict included: one of INTERVALS

    @property
    def published(self) -> tuple[Published, ...]:
        """The published tables."""
        return (self.paper,) if isinstance(self.paper, Published) else tuple(self.paper)

    def at(self, scale: str) -> Scale:
        """Returns a scale with nothing left open; raises UserError for one that is not there."""
        if scale not in self.scales:
            raise unknown("scale", scale, self.scales)
        there = self.scales[scale]
        there = Scale(there) if isinstance(there, str) else there
        return Scale(
            there.config,
            there.overrides,
            there.sweep or self.sweep,
            there.seeds or self.seeds,
            there.verdict or self.verdict,
            there.cost,
            there.claim or self.claim,
        )

    def facts(self, name: str, scale: str) -> dict[str, Any]:
        """Returns what sweep.json keeps for the report."""
        return {
            "name": name,
            "scale": scale,
            "claim": self.at(scale).claim,
            "interval": self.interval,
            "published": [
                {
                    "metric": table.metric,
                    "setting": table.setting,
                    "source": table.source,
                    "sure": table.sure,
                    "same_setting": scale in table.scales,
                    "rows": {norm: _as_json(row) for norm, row in table.rows.items()},
                }
                for table in self.published
                if scale in table.scales or not any(scale in t.scales for t in self.published)
            ],
        }


def _as_json(row: Number | Mapping[Any, Number]) -> dict[str, Any]:
    """Returns {setting or swept value, "" for any: number}."""
    cells = row if isinstance(row, Mapping) else {"": row}
    return {
        str(where): (number if isinstance(number, Measured) else Measured(number)).as_json()
        for where, number in cells.items()
    }


def load_experiment(path_text: str) -> tuple[str, Experiment]:
    """Returns (name, experiment) of a file, or of a name in `experiments/`.

    Raises UserError, one line, for a file that is missing, does not load, or whose parts do not fit
    together.
    """
    path = _find(path_text)
    spec = importlib.util.spec_from_file_location(f"normlab_experiment_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses of an experiment's own look there
    try:
        spec.loader.exec_module(module)
        experiment = module.EXPERIMENT
    except UserError as error:
        raise UserError(f"experiment {str(path)!r}: {error}") from error
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"experiment {str(path)!r} does not load: {reason}") from error
    if not isinstance(experiment, Experiment):
        raise UserError(f"experiment {str(path)!r}: EXPERIMENT is no Experiment")
    _check(str(path), experiment)
    return path.stem, experiment


def _find(text: str) -> Path:
    folder = experiments_folder()
    path = Path(text)
    candidates = [path, folder.parent / path] if path.suffix == ".py" else [folder / f"{text}.py"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    names = [file.stem for file in experiment_files()]
    raise UserError(f"experiment {text!r} does not exist{nearest(path.stem, names)}")


def experiments_folder() -> Path:
    """Returns the folder `experiments/` of this checkout."""
    return Path(__file__).resolve().parent.parent / "experiments"


def experiment_files() -> list[Path]:
    """Returns the experiments of this checkout, by name."""
    files = experiments_folder().glob("*.py")
    return sorted(file for file in files if not file.name.startswith("_"))


def _check(path: str, experiment: Experiment) -> None:
    """Raises UserError for an unknown interval, and a number that no run could stand beside."""
    if experiment.interval not in INTERVALS:
        raise UserError(
            f"experiment {path!r}: {unknown('interval', str(experiment.interval), INTERVALS)}"
        )
    sweeps = [experiment.at(scale).sweep or experiment.sweep for scale in experiment.scales]
    norms = {point.fields.get("norm") for points in sweeps for point in points} - {None}
    for table in experiment.published:
        if table.metric not in METRICS:
            raise UserError(
                f"experiment {path!r}: {unknown('published metric', table.metric, METRICS)}"
            )
        for scale in table.scales:
            if scale not in experiment.scales:
                raise UserError(
                    f"experiment {path!r}: {unknown('scale', scale, experiment.scales)}"
                )
        for norm, row in table.rows.items():
            if norms and norm not in norms:
                options = sorted(map(str, norms))
                raise UserError(
                    f"experiment {path!r}: published row {norm!r} is in no sweep"
                    f"{nearest(norm, options)}"
                )
            _check_places(path, norm, row, sweeps)


def _check_places(
    path: str, norm: str, row: Number | Mapping[Any, Number], sweeps: list[Grid]
) -> None:
    numbers = row.values() if isinstance(row, Mapping) else [row]
    for number in numbers:
        value = number.value if isinstance(number, Measured) else number
        if not 0 <= value <= 100 or math.isnan(value):
            raise UserError(f"experiment {path!r}: published {value} of {norm!r} is no percentage")
    if not isinstance(row, Mapping):
        return
    places = {
        str(place)
        for points in sweeps
        for point in points
        if point.fields.get("norm", norm) == norm
        for place in (point.setting, *(point.swept.values() if len(point.swept) == 1 else ()))
    }
    for place in row:
        if str(place) not in places:
            raise UserError(
                f"experiment {path!r}: published row {norm!r} has {place!r}, which no sweep has"
                f"{nearest(str(place), sorted(places))}"
            )
