"""Many runs, planned: a list of labelled configs, kept in `sweep.json`.

Runs are content-addressed (`config.run_id`), so settings that cannot differ share one run.
`normlab.pool` runs a plan.
"""

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from normlab import run
from normlab.errors import UserError, unknown
from normlab.grid import Grid, Point
from normlab.report.claim import NO_RESULT


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One labelled run of a plan; two of them may have the same id."""

    id: str
    labels: Mapping[str, Any]  # setting, norm, seed
    source: str  # config file and choices
    overrides: Mapping[str, Any]  # {dotted name: value}
    steps: int = 0  # of training

    @property
    def label(self) -> str:
        """A few words for a line of progress."""
        tuned = (f"{name}={value}" for name, value in self.labels.get("tuned", {}).items())
        parts = (self.labels["setting"], self.labels["norm"], *tuned, f"seed {self.labels['seed']}")
        return " · ".join(parts)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a comparison is made of."""

    config: str
    norms: tuple[str, ...]
    settings: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    overrides: Mapping[str, Any]  # of all runs
    runs: tuple[PlannedRun, ...]
    experiment: Mapping[str, Any] | None = None  # what the report says of a paper's claim


def make_plan(
    source: str,
    grid: Grid,
    *,
    seeds: Iterable[int],
    overrides: Mapping[str, Any],
    declared: Mapping[str, Any] | None = None,
    experiment: Mapping[str, Any] | None = None,
) -> Plan:
    """Returns the runs of a grid × seeds over one config.

    `source` is FILE.py[:choices], none of them a choice of the grid. `overrides` are of all points,
    and a point's own fields come before them. A field `norm.*` among the overrides, or in a setting
    that other normalizers share, goes to those normalizers that have it. `declared` are overrides
    of an experiment's scale, which come first. `experiment` is kept in sweep.json for the report.
    Every config is built (without computing) before any runs, so a mistake in one setting is found
    before the first run starts. Raises UserError.
    """
    from normlab.config import flatten, layered, load_config
    from normlab.norms import NORMS
    from normlab.run_length import RunLength
    from normlab.training.setup import build_parts, id_of
    from normlab.training.sinks import check_sinks

    seeds = tuple(seeds)
    declared = declared or {}
    overrides = layered(declared, overrides)
    for fields in (overrides, *(point.fields for point in grid)):
        if "seed" in fields:
            raise UserError(f"seed={fields['seed']} is set; a sweep has the seeds of --seeds")
    for point in grid:
        norm = point.fields.get("norm")
        if norm is not None and norm not in NORMS:
            raise unknown("norm", norm, NORMS)
    for name in overrides:
        if all(name in point.fields for point in grid):
            raise UserError(f"the sweep sets {name!r} itself; an override would change nothing")
    sources = {_key(point): _with_choices(source, point.choices) for point in grid}
    configs = {text: load_config(text) for text in set(sources.values())}
    has = {text: set(flatten(config)) for text, config in configs.items()}
    everywhere = set().union(*has.values())

    runs = []
    for seed in seeds:
        for point in grid:
            text = sources[_key(point)]
            chosen = {
                name: value
                for name, value in layered(overrides, point.overrides, {"seed": seed}).items()
                if name in has[text] or name not in everywhere
            }
            config = load_config(text, chosen)
            if seed == seeds[0]:
                build_parts(config)
                check_sinks(config)
                if point.tuned and not config.data.num_validation:
                    raise UserError(
                        f"{min(point.tuned)!r} is to be chosen on validation data, "
                        "but data.num_validation is 0"
                    )
            labels = {"setting": point.setting, "norm": config.norm.kind, "seed": seed}
            labels |= point.swept
            if point.tuned:
                labels["tuned"] = dict(point.tuned)
            steps = RunLength.of(config).num_steps
            runs.append(PlannedRun(id_of(config), labels, text, chosen, steps))

    def plain(fields: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields as the configs have them: 4, "4" and (4,) may be one value."""
        found = {}
        for name, value in fields.items():
            text = next((text for text in has if name in has[text]), None)
            found[name] = flatten(load_config(text, {name: value}))[name] if text else value
        return found

    named = {
        point.setting: _shared([(p, plain(_own(p))) for p in grid if p.setting == point.setting])
        for point in grid
    }
    norms = tuple(dict.fromkeys(planned.labels["norm"] for planned in runs))
    path, colon, choices = source.partition(":")
    source = f"{os.path.normpath(path)}{colon}{choices}"
    if experiment is not None:
        experiment = {**experiment, "declared": plain(declared)}
    return Plan(source, norms, named, seeds, plain(overrides), tuple(runs), experiment)


def _own(point: Point) -> dict[str, Any]:
    """Returns the fields that a point sets, but for the normalizer and what is tuned."""
    return {name: x for name, x in point.fields.items() if name not in {"norm", *point.tuned}}


def _shared(points: list[tuple[Point, dict[str, Any]]]) -> dict[str, Any]:
    """Returns the fields of a setting; one that not all points set alike says whose it is."""
    found: dict[str, Any] = {}
    for point, fields in points:
        for name, value in fields.items():
            alike = all(name in other and other[name] == value for _, other in points)
            whose = "" if alike else f"{point.fields.get('norm', 'all')}: "
            found[f"{whose}{name}"] = value
    return found


def _key(point: Point) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(point.choices.items()))


def _with_choices(source: str, choices: Mapping[str, str]) -> str:
    """Returns FILE.py:choices with a grid's choices added; raises UserError if one is there."""
    path, _, there = source.partition(":")
    parts = [part.strip() for part in there.split(",") if part.strip()]
    for part in parts:
        name = part.partition("=")[0]
        if name in choices:
            raise UserError(f"config {source!r} chooses {name!r}, which the sweep varies")
    text = ",".join([*parts, *(f"{name}={value}" for name, value in choices.items())])
    return f"{path}:{text}" if text else path


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Makes the folder and holds its lock; raises UserError if it is not ours to take."""
    with contextlib.ExitStack() as stack:
        try:
            _earlier_plan(folder)  # another's folder is refused before anything is left in it
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(run.locked(folder))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            reason = os.strerror(error.errno or 0)
            raise UserError(f"workdir {str(folder)!r} cannot be written: {reason}") from error
        yield


def write_plan(plan: Plan, folder: Path, *, redo_other_commits: bool = False) -> None:
    """Writes sweep.json: the planned runs, with those of an earlier plan in the folder.

    Raises UserError, and writes nothing, if the folder holds something else, a comparison of
    another config, or another run under the same label. With `redo_other_commits`, runs of another
    commit are renamed to `ID.old-N`, so that they are run again.
    """
    earlier = _earlier_plan(folder) or _as_json(dataclasses.replace(plan, runs=()))
    _check_same_meaning(earlier, _as_json(plan), folder)
    entries = {_label_key(entry["labels"]): entry for entry in earlier["runs"]}
    for planned in plan.runs:
        entry = {"id": planned.id, "labels": dict(planned.labels)}
        there = entries.setdefault(_label_key(planned.labels), entry)
        if there["id"] != planned.id:
            raise UserError(
                f"workdir {str(folder)!r} has another run as {planned.label!r}"
                f"{_why_other(folder / there['id'], planned)}; "
                "choose another folder or setting name"
            )
    if redo_other_commits:
        _set_aside_other_commits(plan, folder)
    data = _as_json(plan) | {
        "settings": {**earlier["settings"], **plan.settings},
        "norms": list(dict.fromkeys([*earlier["norms"], *plan.norms])),
        "seeds": sorted({*earlier["seeds"], *plan.seeds}),
        "runs": list(entries.values()),
    }
    run.write_json(folder / run.SWEEP, data)


def _as_json(plan: Plan) -> dict[str, Any]:
    data = {
        "schema_version": 1,
        "config": plan.config,
        "overrides": dict(plan.overrides),
        "settings": {name: dict(changes) for name, changes in plan.settings.items()},
        "norms": list(plan.norms),
        "seeds": list(plan.seeds),
        "runs": [{"id": planned.id, "labels": dict(planned.labels)} for planned in plan.runs],
        **({"experiment": dict(plan.experiment)} if plan.experiment else {}),
    }
    return json.loads(json.dumps(data))  # as it is read again: a tuple is a list


def _earlier_plan(folder: Path) -> dict[str, Any] | None:
    """Returns sweep.json; None in a folder that is new or empty."""
    path = folder / run.SWEEP
    earlier = run.read_json(path) if folder.is_dir() else None
    if earlier is None:
        found = run.strangers(folder)
        if found:
            raise UserError(
                f"workdir {str(folder)!r} is no comparison's and holds {found[0]!r}; "
                "choose an empty or new folder"
            )
        return None
    for name, (kind, inner) in _SHAPE.items():
        value: Any = earlier.get(name)
        parts = value.values() if isinstance(value, dict) else value
        if not isinstance(value, kind) or not all(isinstance(part, inner) for part in parts):
            raise UserError(f"{path} is damaged: its {name!r} is {value!r}"[:300])
    for entry in earlier["runs"]:
        if not isinstance(entry.get("id"), str) or not isinstance(entry.get("labels"), dict):
            raise UserError(f"{path} is damaged: it has the run {entry!r}"[:300])
    return earlier


_SHAPE: dict[str, tuple[type, type]] = {
    "config": (str, str),
    "overrides": (dict, object),
    "settings": (dict, dict),
    "norms": (list, str),
    "seeds": (list, int),
    "runs": (list, dict),
}
"""What each part of sweep.json is, and what its own parts are."""


def _check_same_meaning(there: Mapping[str, Any], here: Mapping[str, Any], folder: Path) -> None:
    """Raises UserError where the same name would stand for two things in one table."""

    def refuse(what: str, old: Any, new: Any) -> None:
        raise UserError(
            f"workdir {str(folder)!r} holds a comparison with {what} {old}, not {new}; "
            "choose another folder"
        )

    names = [(plan.get("experiment") or {}).get("name", "none") for plan in (there, here)]
    if names[0] != names[1]:
        refuse("experiment", *map(repr, names))
    if there["config"] != here["config"]:
        refuse("config", repr(there["config"]), repr(here["config"]))
    pairs = [("override", there["overrides"], here["overrides"])]
    pairs += [
        (f"setting {name!r}:", there["settings"][name], changes)
        for name, changes in here["settings"].items()
        if name in there["settings"]
    ]
    for what, old, new in pairs:
        for field in dict.fromkeys([*old, *new]):
            a, b = (fields.get(field, "its default") for fields in (old, new))
            if a != b and not field.startswith(NO_RESULT):
                refuse(f"{what} {field} =", a, b)


def _label_key(labels: Mapping[str, Any]) -> str:
    return json.dumps(labels, sort_keys=True)


def _why_other(folder: Path, planned: PlannedRun) -> str:
    """Returns `: field is a there and b here` for the first difference, "" if it is not known."""
    from normlab.config import load_config
    from normlab.training.setup import run_identity

    there = run.read_json(folder / "identity.json")
    here = run_identity(load_config(planned.source, planned.overrides))
    difference = run.first_difference(there, here) if there else None
    return ": {} is {!r} there and {!r} here".format(*difference) if difference else ""


def _set_aside_other_commits(plan: Plan, folder: Path) -> None:
    commit, _ = run.git_state()
    for run_id in {planned.id for planned in plan.runs}:
        manifest = run.read_json(folder / run_id / "manifest.json")
        if manifest and manifest.get("git_commit") != commit:
            (folder / run_id).rename(run.free_name(folder / f"{run_id}.old"))
