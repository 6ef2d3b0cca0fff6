"""The files of a run folder as plain values: what cannot be read becomes a note, never a crash."""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from normlab.files import blocks_of, read_small

RUN_ID = re.compile(r"\w[\w.-]*")
"""A run's folder in a sweep's; nothing else, as it could point out of the sweep's folder."""


def read_json(path: Path, notes: list[str], *, required: bool = True) -> dict[str, Any]:
    """Returns the object in a JSON file; {} and a note if there is none."""
    try:
        value = _parse(read_small(path))
    except ValueError:
        value = None
    except OSError as error:
        _note_unread(path, error, notes, required)
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} is not a readable JSON object")
        return {}
    return value


_PERCENTILE = re.compile(r"p[0-9]{1,3}(\.[0-9]{1,6})?")

Curve = tuple[tuple[int, float], ...]  # (steps, value), by step


def read_metrics(path: Path, notes: list[str], *, required: bool) -> tuple[Curve, dict[str, Curve]]:
    """Returns metrics.jsonl's curve of test accuracy, and those of the probe by percentile."""
    points: dict[int, float] = {}
    probe: dict[str, dict[int, float]] = {}
    passed_over: dict[int, float] = {}
    unreadable: list[int] = []  # the numbers of the first few
    last = bad = 0
    for lines in _blocks(path, notes, required):
        numbered = [(i, line) for i, line in enumerate(lines, last + 1) if line.strip()]
        last += len(lines)
        events = _parse_lines([line for _, line in numbered])
        for (line_number, _), event in zip(numbered, events, strict=True):
            if not isinstance(event, dict):
                bad += 1
                unreadable += [line_number] if bad <= 5 else []
                continue
            split, skipped = event.get("split"), event.get("nonfinite")
            if split not in ("test", "probe") and not skipped:
                continue  # as most lines: there is nothing here that a report shows
            step = integer(event.get("step"))
            if step is None:
                continue
            if split == "test" and (accuracy := number(event.get("accuracy"))) is not None:
                points[step] = accuracy
            if split == "probe":
                for name, value in event.items():
                    if _PERCENTILE.fullmatch(name) and (measured := number(value)) is not None:
                        probe.setdefault(one_line(name), {})[step] = measured
            # Counted since the line before; keyed by step: a line written twice counts once.
            if count := number(skipped):
                passed_over[step] = count
    if unreadable == [last]:
        notes.append(f"{path.name}: the last line is cut off")
    elif unreadable:
        first = ", ".join(map(str, unreadable)) + (", ..." if bad > len(unreadable) else "")
        notes.append(f"{path.name}: {bad} unreadable (line {first})")
    total = sum(passed_over.values())
    if total:
        notes.append(f"{total:.0f} steps passed over because something was not finite")
    return _by_step(points), {name: _by_step(values) for name, values in probe.items()}


def read_series(path: Path, split: str) -> dict[str, Curve]:
    """Returns the finite numbers of metrics.jsonl's lines of a split, by name; {} without file."""
    found: dict[str, dict[int, float]] = {}
    for event in _events(path):
        step = integer(event.get("step")) if isinstance(event, dict) else None
        if step is None or event.get("split") != split:
            continue
        for name, value in event.items():
            if name != "step" and (measured := number(value)) is not None:
                found.setdefault(one_line(name), {})[step] = measured
    return {name: _by_step(values) for name, values in found.items()}


def read_seconds(path: Path, curve: Curve) -> tuple[float, ...]:
    """Returns the training seconds of timing.jsonl at each point of a curve.

    () if the file does not tell them all, or if they run backwards. The lines of a step say the
    same, so one is read of each; the first, as the last may be cut off.
    """
    if not curve:
        return ()
    of_step: dict[bytes, bytes] = {}
    for lines in _blocks(path, [], required=False):
        for line in filter(bytes.strip, lines):
            of_step.setdefault(line.partition(b",")[0], line)
    events = [event for event in _parse_lines([*of_step.values()]) if isinstance(event, dict)]
    told = {integer(event.get("step")): number(event.get("train_seconds")) for event in events}
    seconds = [told.get(step) for step, _ in curve]
    found = [value for value in seconds if value is not None and value >= 0]
    return tuple(found) if len(found) == len(curve) and found == sorted(found) else ()


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the JSON objects among a file's lines."""
    for lines in _blocks(path, [], required=False):
        yield from (event for event in _parse_lines(lines) if isinstance(event, dict))


def _blocks(path: Path, notes: list[str], required: bool) -> Iterator[list[bytes]]:
    """Yields a file's lines as `blocks_of` does; nothing, and a note, if it cannot be read."""
    try:
        yield from blocks_of(path)
    except OSError as error:
        _note_unread(path, error, notes, required)


def _parse_lines(lines: list[bytes]) -> list[Any]:
    """Returns the JSON value of each line, None for one that is not JSON."""
    values = _parse(b"[%s]" % b",".join(lines))  # all at once takes half the time
    if isinstance(values, list) and len(values) == len(lines):
        return values
    return [_parse(line) for line in lines]


def _by_step(points: dict[int, float]) -> Curve:
    return tuple(sorted(points.items()))


def _note_unread(path: Path, error: OSError, notes: list[str], required: bool) -> None:
    if not isinstance(error, FileNotFoundError):
        notes.append(f"{path.name} cannot be read: {error.strerror}")
    elif required:
        notes.append(f"{path.name} is missing")


def _parse(data: bytes) -> Any:
    """Returns the JSON value, None if it is not JSON (or is null)."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def provenance(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Returns what a fair comparison has in common: {what: value}."""
    if not manifest:
        return {}
    commit = one_line(manifest.get("git_commit") or "unknown")[:12]
    dirty = " with uncommitted changes" if manifest.get("git_dirty") else ""
    found = {"git commit": f"{commit}{dirty}"}
    for name, key in (
        ("data fingerprint", "data_fingerprint"),
        ("python", "python"),
        ("platform", "platform"),
        ("cpu", "cpu"),
        ("devices", "devices"),
        ("threads", "threads"),
    ):
        if manifest.get(key) is not None:
            found[name] = plain_text(manifest[key])
    for section in ("versions", "environment"):
        values = manifest.get(section)
        if isinstance(values, dict):
            found |= {one_line(key): plain_text(value) for key, value in sorted(values.items())}
    return found


def resumed_elsewhere(manifest: Mapping[str, Any]) -> list[str]:
    """Returns a note for each thing that was another one when the run was resumed."""
    first, resumed = provenance(manifest), manifest.get("resumed")
    found = []
    for machine in resumed if isinstance(resumed, list) else ():
        later = provenance(machine) if isinstance(machine, dict) else {}
        found += [
            f"resumed under another {what}: {value}, begun under {first[what]}"
            for what, value in later.items()
            if what in first and first[what] != value
        ]
    return list(dict.fromkeys(found))


def sane(result: dict[str, float | str], notes: list[str]) -> dict[str, float | str]:
    """Returns a result without accuracies that are no fraction; each is noted."""
    kept = {}
    for name, value in result.items():
        if "accuracy" in name and isinstance(value, (int, float)) and not 0 <= value <= 1:
            notes.append(f"result.json: {name} = {value:g} is not from 0 to 1, left out")
        else:
            kept[name] = value
    return kept


def pairing(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Returns {what: hash} of what paired runs share: the data, its order, initial values.

    A parameter's shape is part of its name: one that differs in shape is not the same parameter.
    """
    names = {
        "data_fingerprint": "data",
        "data_order_hash": "data order",
        "augmentation_hash": "augmentation",
    }
    found = {
        name: one_line(manifest[field]) for field, name in names.items() if manifest.get(field)
    }
    initial = manifest.get("init_hashes")
    if isinstance(initial, dict):
        for name, value in initial.items():
            shape, _, digits = str(value).rpartition(" ")
            found[one_line(f"initial {name} {shape}").strip()] = digits
    return found


# Values ------------------------------------------------------------------------------------------


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {dotted name: value} of all fields, sections opened."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def finite_result(result: Mapping[str, Any]) -> dict[str, float | str]:
    """Returns the finite numbers and the texts of a result; null means not finite."""
    kept: dict[str, float | str] = {}
    for key, value in result.items():
        finite = number(value)
        if finite is not None:
            kept[one_line(key)] = finite
        elif isinstance(value, str):
            kept[one_line(key)] = one_line(value)
    return kept


def number(value: Any) -> float | None:
    """Returns a finite JSON number, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # Comparing, unlike math.isfinite, takes an int of any length.
    return value if abs(value) <= sys.float_info.max else None


def as_number(text: str) -> float | None:
    """Returns the finite number that a text says, None for anything else."""
    try:
        return number(float(text))
    except ValueError:
        return None


def integer(value: Any) -> int | None:
    """Returns a JSON integer that a float holds exactly, None for anything else."""
    exact = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 2**53
    return value if exact else None


def one_line(value: Any) -> str:
    """Returns text on one line without control characters (a terminal would obey them)."""
    text = " ".join(str(value).split())
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def plain_text(value: Any) -> str:
    """Returns a JSON value as a person writes it in an override."""
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain_text, value))
    return one_line(str(value).lower() if isinstance(value, bool) else value)
