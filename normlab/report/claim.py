"""What a sweep's folder says of the paper: the claim, its published numbers, the verdict.

All of it is read from sweep.json and verdict.json, so that a report depends on the folder alone.
What cannot be read becomes a note.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normlab.report.files import number, one_line, read_json
from normlab.report.quantity import Quantity, from_json
from normlab.report.statistics import INTERVALS

ACCURACIES = ("test_accuracy", "test_error")
"""What a paper's table is of, if not of a quantity that the experiment measures."""

NO_RESULT = ("checkpoint.", "log.", "parallel.", "data.path")  # fields that change no result


@dataclass(frozen=True)
class PublishedNumber:
    """One cell of a paper's table: test accuracy in percent, or a quantity."""

    value: float
    std: float | None = None  # over the paper's runs
    n: int | None = None  # the paper's runs


@dataclass(frozen=True)
class PublishedTable:
    """A paper's numbers; an error of e is shown as an accuracy of 100 − e.

    Without a `quantity` they are of test accuracy, in percent.
    """

    rows: Mapping[str, Mapping[str, PublishedNumber]]  # norm -> {setting, value or "": number}
    setting: str
    source: str
    sure: str
    same_setting: bool  # this scale is the paper's own setting, so values compare
    as_error: bool  # published as error
    quantity: str = ""  # what they are of, one of the claim's quantities

    def number(self, norm: str, places: tuple[str, ...]) -> PublishedNumber | None:
        """Returns the number of a normalizer at the first of `places` that the table has."""
        row = self.rows.get(norm, {})
        return next((row[place] for place in (*places, "") if place in row), None)


@dataclass(frozen=True)
class Claim:
    """A paper's claim at one scale, and what came out."""

    name: str
    scale: str
    text: str
    published: tuple[PublishedTable, ...]
    outcome: str  # "" if there is no verdict yet
    sentences: tuple[str, ...]
    test: str
    rows: str  # digest of the rows that the verdict rests on
    judged_by: str = "t"  # the interval that the verdict rests on, one of statistics.INTERVALS
    quantities: tuple[Quantity, ...] = ()  # measured on the runs besides their accuracy

    def quantity(self, name: str) -> Quantity:
        """Returns the quantity of this name; one without values if none was measured."""
        named = {found.name: found for found in self.quantities}
        return named.get(name, Quantity(name, {}))


def read_claim(plan: Mapping[str, Any], directory: Path, notes: list[str]) -> Claim | None:
    """Returns the claim of a sweep's plan; None if it is no experiment's."""
    facts = plan.get("experiment")
    if facts is None:
        return None
    if not isinstance(facts, dict):
        notes.append("sweep.json: 'experiment' is not an object, left out")
        return None
    tables = facts.get("published")
    found = read_json(directory / "verdict.json", notes, required=False)
    sentences = found.get("sentences")
    return Claim(
        name=one_line(facts.get("name") or "experiment"),
        scale=one_line(facts.get("scale") or ""),
        text=one_line(facts.get("claim") or ""),
        published=tuple(_table(table, not overridden(plan)) for table in _dicts(tables)),
        outcome=one_line(found.get("outcome") or ""),
        sentences=tuple(map(one_line, sentences)) if isinstance(sentences, list) else (),
        test=one_line(found.get("test") or ""),
        rows=one_line(found.get("rows") or ""),
        judged_by=one_line(found.get("interval") or "t"),
        quantities=tuple(filter(None, map(from_json, _listed(found.get("quantities"))))),
    )


def overridden(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that the command line set for all runs and that can change a result.

    Not those that an experiment's scale declares, at the value that it declares.
    """
    given = plan.get("overrides")
    fields = given.items() if isinstance(given, dict) else ()
    facts = plan.get("experiment")
    declared = facts.get("declared") if isinstance(facts, dict) else None
    declared = declared if isinstance(declared, dict) else {}
    return {
        one_line(name): value
        for name, value in fields
        if not one_line(name).startswith(NO_RESULT)
        if name not in declared or declared[name] != value
    }


def read_interval(plan: Mapping[str, Any], notes: list[str]) -> str:
    """Returns the interval that an experiment's declaration asks for; t if it is none's."""
    facts = plan.get("experiment")
    asked = facts.get("interval", "t") if isinstance(facts, dict) else "t"
    if asked in tuple(INTERVALS):
        return asked
    notes.append(f"sweep.json: no such interval as {one_line(asked)!r}, t is used")
    return "t"


def _table(table: Mapping[str, Any], as_declared: bool) -> PublishedTable:
    metric = one_line(table.get("metric") or "test_accuracy")
    as_error = metric == "test_error"
    rows = table.get("rows")
    found: dict[str, dict[str, PublishedNumber]] = {}
    for norm, cells in (rows if isinstance(rows, dict) else {}).items():
        for place, cell in (cells if isinstance(cells, dict) else {}).items():
            value = number(cell.get("value")) if isinstance(cell, dict) else None
            if value is not None:
                accuracy = 100 - value if as_error else value
                runs = number(cell.get("n"))
                found.setdefault(one_line(norm), {})[one_line(place)] = PublishedNumber(
                    accuracy, number(cell.get("std")), None if runs is None else int(runs)
                )
    texts = {name: one_line(table.get(name) or "") for name in ("setting", "source", "sure")}
    return PublishedTable(
        found,
        **texts,
        same_setting=as_declared and bool(table.get("same_setting")),
        as_error=as_error,
        quantity="" if metric in ACCURACIES else metric,
    )


def _dicts(values: Any) -> list[dict[str, Any]]:
    return [value for value in _listed(values) if isinstance(value, dict)]


def _listed(values: Any) -> list[Any]:
    return values if isinstance(values, list) else []
