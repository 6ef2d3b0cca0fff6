"""A paper's claim as one declaration: what it says, what it published, what to run, the verdict.

A file in `experiments/` has one `EXPERIMENT`. It is run at a scale that fits the machine; at a
scale that is not the paper's own setting, its numbers stand beside ours for their order and sign,
not for their value.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from normlab.errors import UserError, nearest, unknown
from normlab.grid import Grid, Point, grid, settings, tune
from normlab.report.claim import ACCURACIES
from normlab.report.differences import Measure
from normlab.report.files import number, one_line
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
    """A table of a paper: of accuracies or errors in percent, or of a quantity."""

    metric: str  # test_accuracy, test_error, or the name of one of the experiment's quantities
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
    quantities: Mapping[str, Measure] = field(default_factory=dict)  # of a run, besides accuracy

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
            self.sweep if there.sweep is None else there.sweep,
            self.seeds if there.seeds is None else there.seeds,
            self.verdict if there.verdict is None else there.verdict,
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
    try:
        experiment = _execute(path)
        _check(experiment)
    except UserError as error:
        raise UserError(f"experiment {str(path)!r}: {error}") from error
    return path.stem, experiment


def _execute(path: Path) -> Experiment:
    """Returns a file's EXPERIMENT; raises UserError for whatever its code does instead."""
    spec = importlib.util.spec_from_file_location(f"normlab_experiment_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses of an experiment's own look there
    try:
        spec.loader.exec_module(module)
        experiment = module.EXPERIMENT
    except UserError:
        raise
    except SystemExit as error:
        raise UserError(f"the file does not load: it calls sys.exit({error})") from error
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"the file does not load: {reason}") from error
    if not isinstance(experiment, Experiment):
        raise UserError(f"EXPERIMENT is {_shown(experiment)}, no Experiment")
    return experiment


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


# What fits together ------------------------------------------------------------------------------

_SCALE: tuple[tuple[str, Any, str], ...] = (
    ("config", str, "FILE.py[:choices]"),
    ("overrides", Mapping, "{field: value}"),
    ("sweep", Grid, "what grid() returns"),
    ("seeds", int, "a number of seeds"),
    ("verdict", Callable, "a function of the rows"),
    ("cost", str, "text"),
    ("claim", str, "text"),
)
"""What each field of a scale is, and what to call it."""

_PUBLISHED: tuple[tuple[str, Any, str], ...] = (
    ("rows", Mapping, "{normalizer: number}"),
    ("setting", str, "text"),
    ("source", str, "text"),
    ("sure", str, "text"),
    ("scales", (tuple, list), "a tuple of names"),
)


def _check(experiment: Experiment) -> None:
    """Raises UserError for a field of the wrong kind, and a number that no run could stand beside.

    The declarations are a person's own Python file, so nothing in them is taken for granted.
    """
    if str(experiment.interval) not in INTERVALS:
        raise unknown("interval", str(experiment.interval), INTERVALS)
    _require("scales", experiment.scales, Mapping, "{name: config or Scale}")
    if not experiment.scales:
        raise UserError("scales is {}: it names no scale")
    for name, there in experiment.scales.items():
        _require("the name of a scale", name, str, "text")
        _require(f"scales[{name!r}]", there, (str, Scale), "a config or a Scale")
        _check_scale(name, experiment.at(name))
    _require("quantities", experiment.quantities, Mapping, "{name: function of a row}")
    for name, of_row in experiment.quantities.items():
        _require("the name of a quantity", name, str, "text")
        _require(f"quantities[{name!r}]", of_row, Callable, "a function of a row")
    tables = experiment.paper if isinstance(experiment.paper, (tuple, list)) else [experiment.paper]
    for table in tables:
        _require("paper", table, Published, "a Published or a tuple of them")
        _check_published(table, experiment)


def _check_scale(name: str, scale: Scale) -> None:
    where = f" at scale {name!r}"
    for field_name, kind, wanted in _SCALE:
        _require(f"{field_name}{where}", getattr(scale, field_name), kind, wanted)
    for field_name in scale.overrides:
        _require(f"a field of the overrides{where}", field_name, str, "text")
    assert scale.sweep is not None
    assert scale.seeds is not None
    if scale.seeds < 1:
        raise UserError(f"seeds{where} is {scale.seeds}, and must be 1 or more")
    if not len(scale.sweep):
        raise UserError(f"sweep{where} is an empty Grid: it has no point, so there is no run")
    seen: dict[Any, Point] = {}
    for point in scale.sweep:
        _require(f"a point of the sweep{where}", point, Point, "a Point")
        norm = point.fields.get("norm", "")
        _require(f"norm in the sweep{where}", norm, str, "a normalizer's name")
        first = seen.setdefault((point.setting, norm, str(dict(point.tuned))), point)
        for field_name in dict.fromkeys([*first.fields, *point.fields]):
            a, b = (x.fields.get(field_name, "its default") for x in (first, point))
            if a != b:
                label = " · ".join(filter(None, (point.setting, norm)))
                raise UserError(
                    f"sweep{where} has two points called {label!r}, with {field_name} = {a} and "
                    f"{b}; name them with settings({{name: fields}})"
                )


def _check_published(table: Published, experiment: Experiment) -> None:
    if table.metric not in (metrics := (*ACCURACIES, *experiment.quantities)):
        raise unknown("published metric", str(table.metric), metrics)
    for field_name, kind, wanted in _PUBLISHED:
        _require(f"paper.{field_name}", getattr(table, field_name), kind, wanted)
    for scale in table.scales:
        _require("a scale of paper.scales", scale, str, "text")
        if scale not in experiment.scales:
            raise unknown("scale", scale, experiment.scales)
    points = [p for name in experiment.scales for p in experiment.at(name).sweep or ()]
    norms = {point.fields.get("norm") for point in points} - {None}
    for norm, row in table.rows.items():
        if norms and norm not in norms:
            close_to = nearest(str(norm), sorted(map(str, norms)))
            raise UserError(f"published row {norm!r} is in no sweep{close_to}")
        cells = row if isinstance(row, Mapping) else {"": row}
        for cell in cells.values():
            measured = cell if isinstance(cell, Measured) else Measured(cell)
            _check_number(norm, measured, of_percent=table.metric in ACCURACIES)
        if isinstance(row, Mapping):
            _check_places(norm, row, points)


def _check_number(norm: str, number: Measured, of_percent: bool) -> None:
    wanted = "a percentage" if of_percent else "a number"
    _require(f"published number of {norm!r}", number.value, (int, float), wanted)
    _require(f"published std of {norm!r}", number.std, (int, float, NoneType), wanted)
    _require(f"published n of {norm!r}", number.n, (int, NoneType), "a number of runs")
    for value in (number.value, number.std or 0.0) if of_percent else ():
        if not 0 <= value <= 100:  # nor is NaN
            raise UserError(f"published {value} of {norm!r} is no percentage")


def _check_places(norm: str, row: Mapping[Any, Number], points: list[Point]) -> None:
    places = {
        str(place)
        for point in points
        if point.fields.get("norm", norm) == norm
        for place in (point.setting, *(point.swept.values() if len(point.swept) == 1 else ()))
    }
    for place in row:
        if str(place) not in places:
            raise UserError(
                f"published row {norm!r} has {place!r}, which no sweep has"
                f"{nearest(str(place), sorted(places))}"
            )


def check_verdict(verdict: VerdictFunction | None, cells: Iterable[tuple[str, str]]) -> None:
    """Raises UserError for a hypothesis about a cell that is not planned.

    `cells` are (normalizer, setting) of the planned runs. Only the verdicts of `all_of` say before
    the runs what they are about.
    """
    cells = dict.fromkeys(cells)
    settings_of = {norm: [s for n, s in cells if n == norm] for norm, _ in cells}
    several = {setting for _, setting in cells}
    for hypothesis in getattr(verdict, "hypotheses", ()):
        _require("a hypothesis of the verdict", hypothesis, Hypothesis, "above(...) or close(...)")
        for place in (hypothesis.a, hypothesis.b):
            if place is hypothesis.b and isinstance(place, (int, float)):
                if number(place) is None:
                    raise UserError(f"verdict: {place} is no number to compare with")
                continue
            is_pair = isinstance(place, tuple) and len(place) == 2
            norm, setting = place if is_pair else (place, None)
            if not isinstance(norm, str) or not isinstance(setting, (str, NoneType)):
                raise UserError(
                    f"verdict: {_shown(place)} is neither a normalizer nor (normalizer, setting)"
                )
            if norm not in settings_of:
                raise UserError(
                    f"verdict: the sweep has no normalizer {norm!r}{nearest(norm, settings_of)}"
                )
            if setting is None and len(several) > 1:
                raise UserError(
                    f"verdict: {norm!r} stands in {len(several)} settings; name one, as in "
                    f"({norm!r}, {settings_of[norm][0]!r})"
                )
            if setting is not None and setting not in settings_of[norm]:
                raise UserError(
                    f"verdict: the sweep has no setting {setting!r} with {norm!r}"
                    f"{nearest(setting, settings_of[norm])}"
                )


def _require(what: str, value: Any, kind: Any, wanted: str) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{what} is {_shown(value)}, not {wanted}")


def _shown(value: Any) -> str:
    return one_line(repr(value))[:100]
