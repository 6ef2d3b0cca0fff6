"""Results to keep beside an experiment: rows as JSON, figures, pages; and the table of them all.

`publish` copies what a sweep's report says into a folder that can be committed. `overview` reads
such folders back, so that `experiments/README.md` says what they say and nothing else.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normlab.errors import UserError
from normlab.report import figures, notes, plots
from normlab.report.document import markdown
from normlab.report.drawing import csv_text, escape_markdown
from normlab.report.page import html
from normlab.report.published import numbers
from normlab.report.row import Row, Sweep, digest

ROWS = "rows.json"


def publish(sweep: Sweep, folder: Path) -> list[Path]:
    """Writes rows.json, report.md, report.html, rows.csv and figures; returns their paths.

    Results of the same runs, or of fewer, are replaced. Raises UserError, and writes nothing, for
    others: a trial with other fields must not pass for what was kept; and for a sweep that is no
    experiment's or has no verdict of these rows.
    """
    from normlab.run import write_text

    if sweep.claim is None or sweep.claim.rows != digest(sweep):
        raise UserError(f"{str(sweep.directory)!r} has no experiment with a verdict of its rows")
    kept = _read(folder)
    if kept is not None and not {row["id"] for row in kept["rows"]} <= {x.id for x in sweep.rows}:
        raise UserError(
            f"{str(folder)!r} keeps the results of other runs; move it away, or name another "
            "folder with --results"
        )
    drawn = plots.figures(sweep)
    texts = {
        ROWS: json.dumps(as_json(sweep), indent=1, allow_nan=False) + "\n",
        "report.md": markdown(sweep, drawn, links=False),
        "report.html": html(sweep, drawn, links=False),
        "rows.csv": csv_text(sweep),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(folder / name, text)
    return [*(folder / name for name in texts), *figures.write(drawn.panels(), folder)]


def as_json(sweep: Sweep) -> dict[str, Any]:
    """Returns claim, verdict, numbers and rows of a sweep as JSON values."""
    claim = sweep.claim
    assert claim is not None
    return {
        "schema_version": 1,
        "name": claim.name,
        "scale": claim.scale,
        "claim": claim.text,
        "outcome": claim.outcome,
        "sentences": list(claim.sentences),
        "test": claim.test,
        "interval": sweep.interval,
        "numbers": numbers(sweep),
        "provenance": notes.provenance(sweep),
        "rows": [_row(row) for row in sweep.rows],
    }


def _row(row: Row) -> dict[str, Any]:
    names = ("setting", "norm", "tuned", "seed", "id", "state", "started")
    return {name: getattr(row, name) for name in names} | {"result": dict(row.result)}


# All results -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """An experiment at a scale, for the overview."""

    name: str
    scale: str
    claim: str
    cost: str  # e.g. "10 minutes on 2 cores"


def overview(lines: Iterable[Line], results: Path) -> str:
    """Returns experiments/README.md: claim, command, published, ours, verdict."""
    parts = [
        "# Experiments\n\nOne file a claim of a paper. `normlab paper` lists them; `normlab paper "
        "NAME --scale=SCALE` runs one, resumably, and writes its page to `results/`. This page is "
        "written by `normlab paper --readme` from the results that are there.\n",
        "| claim | command | published (%) | ours (%) | verdict |\n| --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        found = _read(results / f"{line.name}-{line.scale}")
        command = f"normlab paper {line.name} --scale={line.scale}"
        cells = [escape_markdown(line.claim), f"`{command}` ({escape_markdown(line.cost)})"]
        if found is None:
            cells += ["", "not run here", ""]
        else:
            cells += _cells(found, f"results/{line.name}-{line.scale}/report.md")
        parts.append(f"| {' | '.join(cells)} |")
    return "\n".join(parts) + "\n"


def outcome(results: Path, name: str, scale: str) -> str:
    """Returns the verdict that is kept for an experiment at a scale, "" if there is none."""
    found = _read(results / f"{name}-{scale}")
    return str(found["outcome"]) if found else ""


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / ROWS
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert {"numbers", "outcome", "provenance", "rows"} <= found.keys()
    except (ValueError, AssertionError, AttributeError) as error:
        raise UserError(f"{str(path)!r} holds no results") from error
    return found


def _cells(found: dict[str, Any], page: str) -> list[str]:
    published, ours = [], []
    for number in found["numbers"]:
        where = number["norm"] if number["setting"] == "base" else _place(number)
        if number["paper"] is not None:
            mark = "" if number["same_setting"] else " (another setting)"
            published.append(escape_markdown(f"{where} {number['paper']:g}{mark}"))
        ours.append(escape_markdown(f"{where} {number['ours']}"))
    days = sorted({row["started"][:10] for row in found["rows"] if row["started"]})
    when = f", {days[0]}" if days else ""
    commits = ", ".join(commit[:7] for commit in found["provenance"].get("git commit", {}))
    verdict = f"[{found['outcome']}]({page}){when}, commit {commits}"
    return ["<br>".join(published), "<br>".join(ours), verdict]


def _place(number: dict[str, Any]) -> str:
    return f"{number['norm']} in {number['setting']}"
