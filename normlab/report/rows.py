"""Run folders to rows: what was planned, how far each run came, and what it measured.

Reads the bytes of run folders and nothing else (no clock, no network, no jax), so equal folders
give equal rows. A file that is missing, cut off or unreadable becomes a note on its row: a report
at the end of a night's sweep shows a fault and never dies of it.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from normlab.errors import UserError
from normlab.report.claim import overridden, read_claim, read_interval
from normlab.report.files import (
    RUN_ID,
    finite_result,
    flatten,
    integer,
    one_line,
    pairing,
    plain_text,
    provenance,
    read_json,
    read_metrics,
    read_seconds,
    resumed_elsewhere,
    sane,
)
from normlab.report.row import MEASURED, STATES, Row, Sweep
from normlab.report.selection import choose

_NOT_A_SETTING = re.compile(
    r"(schema_version|source|seed|norm\.kind|data\.path|(log|checkpoint|parallel)\..*)"
)


def load(directory: Path, alive: Callable[[Path], bool] | None = None) -> Sweep:
    """Reads a sweep (sweep.json), a single run (config.json) or a folder of run folders.

    `alive` tells whether a process still works on a run folder; a run whose status says `running`
    without one is shown as interrupted. Without `alive` the status stands as it is.

    Raises UserError, one line, if the folder does not exist or holds no run.
    """
    directory = Path(directory)
    if not directory.is_dir():
        what = "is not a folder" if directory.exists() else "does not exist"
        raise UserError(f"folder {str(directory)!r} {what}")
    notes: list[str] = []
    if (directory / "sweep.json").exists():
        plan = read_json(directory / "sweep.json", notes)
        entries = plan.get("runs")
        if isinstance(entries, list) and entries:
            return _planned(directory, plan, entries, alive)
        if not notes:
            raise UserError(f"{str(directory / 'sweep.json')!r} plans no run")
        notes.append("the plan is unknown, so these are the run folders found, not all planned")
    if (directory / "config.json").exists():
        return _found(directory, [directory], notes, alive)
    folders = sorted(path.parent for path in directory.glob("*/config.json"))
    if folders:
        return _found(directory, folders, notes, alive)
    inside = sorted(path.parent.name for path in directory.glob("*/sweep.json"))
    hint = f"; did you mean {str(directory / inside[0])!r}?" if inside else ""
    raise UserError(f"folder {str(directory)!r} holds no run{hint}")


# What was planned --------------------------------------------------------------------------------


def _planned(
    directory: Path,
    plan: Mapping[str, Any],
    entries: list[Any],
    alive: Callable[[Path], bool] | None,
) -> Sweep:
    notes = []
    runs: dict[str, Row] = {}
    first_setting: dict[str, str] = {}
    cells: dict[tuple[str, str, str, str], Row] = {}
    for number, entry in enumerate(entries, 1):
        run_id = entry.get("id") if isinstance(entry, dict) else None
        labels = entry.get("labels") if isinstance(entry, dict) else None
        if not isinstance(run_id, str) or not isinstance(labels, dict):
            notes.append(f"sweep.json: run {number} is not an id with labels, left out")
            continue
        # An id is a folder's name; anything else could point out of the sweep's folder.
        if not RUN_ID.fullmatch(run_id):
            notes.append(f"sweep.json: run {number} has the id {one_line(run_id)!r}, left out")
            continue
        if run_id not in runs:
            runs[run_id] = _read_run(directory / run_id, alive)
        setting = one_line(labels.get("setting", "base"))
        norm = one_line(labels.get("norm", "unknown"))
        earlier = first_setting.setdefault(run_id, setting)
        # The same run twice in one cell is one measurement.
        cells.setdefault(
            (setting, norm, _tuned(labels.get("tuned")), run_id),
            replace(
                runs[run_id],
                id=run_id,
                setting=setting,
                norm=norm,
                seed=integer(labels.get("seed")),
                labels={
                    one_line(key): one_line(value)
                    for key, value in labels.items()
                    if key not in ("setting", "norm", "seed", "tuned")
                },
                tuned=_tuned(labels.get("tuned")),
                shared_with="" if earlier == setting else earlier,
            ),
        )
    rows = tuple(cells.values())
    if not rows:
        raise UserError(f"{str(directory)!r} plans no run: {notes[0]}")
    strays = sorted({path.parent.name for path in directory.glob("*/config.json")} - runs.keys())
    if strays:
        one = len(strays) == 1
        notes.append(
            f"{len(strays)} run folder{'' if one else 's'} here {'is' if one else 'are'} not in "
            f"the plan and left out: {', '.join(map(one_line, strays))}"
        )
    declared = plan.get("settings")
    declared = declared if isinstance(declared, dict) else {}
    settings = {
        one_line(name): value for name, value in declared.items() if isinstance(value, dict)
    }
    norms = plan.get("norms")
    norms = [one_line(norm) for norm in norms] if isinstance(norms, list) else []
    in_rows = {row.setting for row in rows}
    return Sweep(
        directory=directory,
        title=one_line(plan.get("config") or "runs"),
        command=one_line(plan.get("command") or ""),
        settings={name: value for name, value in settings.items() if name in in_rows}
        | {row.setting: {} for row in rows if row.setting not in settings},
        norms=_in_order(norms, (row.norm for row in rows)),
        rows=rows,
        overrides=overridden(plan),
        claim=read_claim(plan, directory, notes),
        interval=read_interval(plan, notes),
        notes=tuple(notes),
        chosen=choose(rows),
    )


def _tuned(values: Any) -> str:
    """Returns e.g. `base_lr=0.1`, "" for a run that is no candidate."""
    if not isinstance(values, dict):
        return ""
    parts = (f"{name.rpartition('.')[2]}={plain_text(value)}" for name, value in values.items())
    return one_line(", ".join(parts))


def _found(
    directory: Path,
    folders: list[Path],
    notes: list[str],
    alive: Callable[[Path], bool] | None,
) -> Sweep:
    """Returns the rows of run folders without a plan, labelled by their configs."""
    found: dict[str, Row] = {}
    for folder in folders:
        row = _read_run(folder, alive)
        # A copied folder is no further seed.
        first = found.setdefault(row.id, row)
        if first is not row:
            notes.append(f"{folder.name} holds the same run as {first.path.name}, left out")
    rows = list(found.values())
    labels = _settings_of([row.config for row in rows])
    rows = [
        replace(
            row,
            setting=label,
            norm=one_line(flatten(row.config).get("norm.kind", "unknown")),
            seed=integer(row.config.get("seed")),
        )
        for row, label in zip(rows, labels, strict=True)
    ]
    rows.sort(key=lambda row: (row.setting, row.norm, -1 if row.seed is None else row.seed, row.id))
    sources = {str(row.config.get("source", "runs")).partition(":")[0] for row in rows}
    return Sweep(
        directory=directory,
        title=one_line(", ".join(sorted(sources))),
        command="",
        settings={label: {} for label in sorted(labels)},
        norms=_in_order([], (row.norm for row in rows)),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _settings_of(configs: list[Mapping[str, Any]]) -> list[str]:
    """Names each config by the fields in which it leaves the most common value, else `base`.

    The seed never makes a setting; fields of the normalizer are compared within one kind of it.
    """
    fields: list[dict[str, Any]] = []
    for config in configs:
        flat = flatten(config)
        kind = flat.get("norm.kind")
        fields.append(
            {
                f"{kind}: {name}" if name.startswith("norm.") else name: value
                for name, value in flat.items()
                if not _NOT_A_SETTING.fullmatch(name)
            }
        )
    values: dict[str, Counter[str]] = {}
    for config in fields:
        for name, value in config.items():
            values.setdefault(name, Counter())[plain_text(value)] += 1
    usual = {name: count.most_common(1)[0][0] for name, count in values.items()}
    labels = []
    for config in fields:
        changed = (
            f"{one_line(name.rpartition(': ')[2])}={plain_text(value)}"
            for name, value in config.items()
            if plain_text(value) != usual[name]
        )
        labels.append(", ".join(changed) or "base")
    return labels


# What a run folder holds -------------------------------------------------------------------------


def _read_run(path: Path, alive: Callable[[Path], bool] | None) -> Row:
    row = Row(setting="", norm="", seed=None, id=path.name, path=path)
    # A folder is made before its status is written; a worker killed in between has done nothing.
    if not any((path / name).exists() for name in ("status.json", "metrics.jsonl", "result.json")):
        return replace(row, config=read_json(path / "config.json", [], required=False))
    notes: list[str] = []
    status = read_json(path / "status.json", notes)
    state = status.get("status")
    if state not in STATES[:-1]:
        if status:
            notes.append(f"status.json: no such status as {one_line(state)!r}")
        state = "interrupted"
    elif state == "running" and alive is not None and not alive(path):
        state = "interrupted"
    finished = state in MEASURED
    result = read_json(path / "result.json", notes, required=finished)
    if result.get("status") in MEASURED:  # a run that has a result is finished
        state, finished = result["status"], True
    manifest = read_json(path / "manifest.json", notes)
    steps_per_epoch = integer(manifest.get("steps_per_epoch")) or 0
    curve, probe = read_metrics(path / "metrics.jsonl", notes, required=finished)
    notes += resumed_elsewhere(manifest)
    return replace(
        row,
        id=one_line(manifest.get("id") or path.name),
        state=state,
        step=integer(status.get("step")),
        message=one_line(status.get("message") or ""),
        result=sane(finite_result(result), notes),
        curve=curve,
        seconds=read_seconds(path / "timing.jsonl", curve),
        steps_per_epoch=steps_per_epoch if steps_per_epoch > 0 else None,
        probe=probe,
        config=read_json(path / "config.json", notes),
        provenance=provenance(manifest),
        pairing=pairing(manifest),
        started=one_line(manifest.get("started") or ""),
        notes=tuple(notes),
    )


def _in_order(declared: Iterable[str], present: Iterable[str]) -> tuple[str, ...]:
    """Returns each name that is present once, in declared order, then in order of appearance."""
    present = dict.fromkeys(present)
    return tuple(dict.fromkeys([*(name for name in declared if name in present), *present]))
