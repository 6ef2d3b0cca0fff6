"""Results to keep beside an experiment: rows as JSON, figures, pages; and the table of them all.

`publish` copies what a sweep's report says into a folder that can be committed. `overview` reads
such folders back, so that `experiments/README.md` says what they say and nothing else.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from normlab.errors import UserError
from normlab.report import figures, notes, plots
from normlab.report.document import markdown
from normlab.report.drawing import csv_text, escape_markdown
from normlab.report.page import html
from normlab.report.published import numbers
from normlab.report.row import Row, Sweep, digest
from normlab.report.verdict import BROKEN, OUTCOMES

ROWS = "rows.json"


def publish(sweep: Sweep, folder: Path) -> list[Path]:
    """Writes rows.json, report.md, report.html, rows.csv and figures; returns their paths.

    Results of the same runs, or of fewer, are replaced. Raises UserError, and writes nothing, for
    others: a trial with other fields must not pass for what was kept; for a sweep that is no
    experiment's or has no verdict of these rows; and where a verdict is kept and this one's code
    failed.
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
    if kept is not None and kept["outcome"] in OUTCOMES and sweep.claim.outcome == BROKEN:
        raise UserError(
            f"{str(folder)!r} keeps the verdict {kept['outcome']!r}, and this one's code failed; "
            "mend it and run the same command again"
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
        "overrides": notes.overrides(sweep.overrides),
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
    options: str = ""  # what the command needs besides, e.g. "--config.data.path=PATH"

    @property
    def command(self) -> str:
        """The command that runs it, with a word in capitals for what a person must fill in."""
        return f"normlab paper {self.name} --scale={self.scale} {self.options}".strip()


def overview(lines: Iterable[Line], results: Path) -> str:
    """Returns experiments/README.md: claim, command, published, ours, verdict."""
    parts = [
        "# Experiments\n\nOne file a claim of a paper. `normlab paper` lists them; `normlab paper "
        "NAME --scale=SCALE` runs one, resumably, and writes its page to `results/`. This page is "
        "written by `normlab paper --readme` from the results that are there. PATH is the data's "
        "on disk; see [data.md](../docs/data.md).\n",
        "| claim | command | published (%) | ours (%) | verdict |\n| --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        found = _read(results / f"{line.name}-{line.scale}")
        cost = f" ({escape_markdown(line.cost)})" if line.cost else ""
        given = [f"--config.{field}" for field in (found or {}).get("overrides", [])]
        command = " ".join([line.command, *given]).replace("`", "'").replace("|", "\\|")
        cells = [escape_markdown(line.claim), f"`{command}`{cost}"]
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
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} holds no results: {error}") from error
    _check(path, "", found, _RESULTS)
    for number in found["numbers"]:
        _check(path, "numbers: ", number, _NUMBER)
    for row in found["rows"]:
        _check(path, "rows: ", row, _ROW)
    _check(path, "provenance: ", found["provenance"], dict.fromkeys(found["provenance"], dict))
    return found


_RESULTS = {"outcome": str, "numbers": list, "provenance": dict, "rows": list}
_NUMBER = {
    "norm": str,
    "setting": str,
    "ours": str,
    "paper": (int, float, NoneType),
    "same_setting": bool,
}
_ROW = {"id": str, "started": str}
"""What is read of rows.json, and of which kind."""


def _check(path: Path, where: str, values: Any, fields: Mapping[str, Any]) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{str(path)!r} is damaged: {where}{values!r} is no object"[:300])
    for name, kind in fields.items():
        if name not in values:
            raise UserError(f"{str(path)!r} is damaged: {where}{name!r} is missing")
        if not isinstance(values[name], kind):
            raise UserError(f"{str(path)!r} is damaged: {where}{name!r} is {values[name]!r}"[:300])


def _cells(found: dict[str, Any], page: str) -> list[str]:
    published, ours = [], []
    for number in found["numbers"]:
        where = number["norm"] if number["setting"] == "base" else _place(number)
        if number.get("quantity"):
            where = f"{number['quantity']}, {where}:"
        if number["paper"] is not None:
            mark = "" if number["same_setting"] else " (another setting)"
            published.append(escape_markdown(f"{where} {number['paper']:g}{mark}"))
        ours.append(escape_markdown(f"{where} {number['ours']}"))
    verdict = ", ".join([f"[{found['outcome']}]({page})", *_made(found)])
    return ["<br>".join(published), "<br>".join(ours), verdict]


def _made(found: dict[str, Any]) -> list[str]:
    """Returns when and with what the rows were made; the version of jax where there are several."""
    days = sorted({row["started"][:10] for row in found["rows"] if row["started"]})
    when = [" to ".join(dict.fromkeys((days[0], days[-1])))] if days else []
    commits = []
    for commit in found["provenance"].get("git commit", {}):
        digits, _, changes = commit.partition(" ")
        commits.append(f"{digits[:7]} {changes}".strip())
    versions = sorted(found["provenance"].get("jax", {}))
    jax = [f"jax {', '.join(versions)}"] if len(versions) > 1 else []
    made = [*when, *([f"commit {', '.join(commits)}"] if commits else []), *jax]
    return [escape_markdown(part) for part in made]


def _place(number: dict[str, Any]) -> str:
    return f"{number['norm']} in {number['setting']}"
