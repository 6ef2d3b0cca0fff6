"""Quantities: numbers of a run besides its test accuracy that a claim is about.

An experiment measures them on its rows when it is judged, and the values are kept beside the
verdict, so a report shows them without the experiment's code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from normlab.report.files import integer, number, one_line

Values = Mapping[tuple[str, str], Mapping[int, float]]
"""(setting, normalizer) -> {seed: value}."""


@dataclass(frozen=True)
class Quantity:
    """What was measured, and what came out."""

    name: str
    values: Values
    failure: str = ""  # why some run is without, if the function of a row failed on it


def as_json(quantity: Quantity) -> dict[str, Any]:
    """Returns the quantity as it is kept in verdict.json: `values` are pairs (seed, value)."""
    cells = [
        {"setting": setting, "norm": norm, "values": list(values.items())}
        for (setting, norm), values in quantity.values.items()
    ]
    return {"name": quantity.name, "cells": cells, "failure": quantity.failure}


def from_json(data: Any) -> Quantity | None:
    """Returns what `as_json` gave, without what is no number; None for anything else."""
    if not isinstance(data, dict) or not isinstance(data.get("cells"), list):
        return None
    found: dict[tuple[str, str], dict[int, float]] = {}
    for cell in data["cells"]:
        pairs = cell.get("values") if isinstance(cell, dict) else None
        for pair in pairs if isinstance(pairs, list) else ():
            whole = isinstance(pair, list) and len(pair) == 2
            seed, value = (integer(pair[0]), number(pair[1])) if whole else (None, None)
            if seed is not None and value is not None:
                place = one_line(cell.get("setting", "")), one_line(cell.get("norm", ""))
                found.setdefault(place, {})[seed] = value
    return Quantity(one_line(data.get("name", "")), found, one_line(data.get("failure") or ""))
