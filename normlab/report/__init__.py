"""Reports: run folders -> rows -> statistics -> tables, plots, page.

Reads run folders' bytes and nothing else, and imports no jax: it starts in a second, works on a
machine that has none, and gives the same bytes again. `write` makes all files.
"""

import os
from pathlib import Path
from typing import NamedTuple, TextIO

from normlab.errors import MachineFault
from normlab.report.row import Row, Sweep
from normlab.report.rows import load

__all__ = ["Paths", "Row", "Sweep", "load", "show", "write"]


class Paths(NamedTuple):
    """The files that `write` made."""

    latex: Path
    html: Path
    markdown: Path
    csv: Path


def write(directory: Path, sweep: Sweep | None = None) -> Paths:
    """Writes report.tex, .html, .md and .csv into `directory`, each whole or not at all.

    `sweep` is what `load(directory)` gave, if the caller has it already. Raises UserError if there
    is nothing to report on, MachineFault if a file cannot be written.
    """
    from normlab.report.document import markdown
    from normlab.report.drawing import csv_text, latex_table
    from normlab.report.page import html
    from normlab.report.tables import headline
    from normlab.run import write_text

    directory = Path(directory)
    sweep = sweep or load(directory)
    paths = Paths(*(directory / f"report.{suffix}" for suffix in ("tex", "html", "md", "csv")))

    def latex(sweep: Sweep) -> str:
        return latex_table(headline(sweep))

    for path, make in zip(paths, (latex, html, markdown, csv_text), strict=True):
        text = make(sweep)
        try:
            write_text(path, text)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise MachineFault(f"{str(path)!r} cannot be written: {reason}") from error
    return paths


def show(sweep: Sweep, stream: TextIO) -> None:
    """Prints the summary, the table and what to beware of: rich on a terminal, else plain text."""
    from normlab.report import drawing, notes, tables

    drawing.say(notes.summary(sweep)[0], stream)
    if sweep.claim is not None:
        drawing.say(f"Claim: {sweep.claim.text}", stream)
    drawing.show(tables.headline(sweep), stream)
    drawing.say(notes.HEADLINE, stream)
    claim = [] if sweep.claim is None else [*sweep.claim.sentences, notes.verdict(sweep)]
    for sentence in [
        *notes.footnotes(sweep),
        *notes.warnings(sweep),
        *notes.choices(sweep),
        *claim,
    ]:
        drawing.say(sentence, stream)
