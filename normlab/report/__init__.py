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

__all__ = ["Paths", "Row", "Sweep", "load", "show", "show_paths", "write"]


class Paths(NamedTuple):
    """What `write` made; no folder of figures where there is nothing to draw."""

    figures: Path | None
    latex: Path
    html: Path
    markdown: Path
    csv: Path


def write(directory: Path, sweep: Sweep | None = None) -> Paths:
    """Writes figures/ and report.tex, .html, .md, .csv into `directory`, each whole or not at all.

    `sweep` is what `load(directory)` gave, if the caller has it already. Raises UserError if there
    is nothing to report on, MachineFault if a file cannot be written.
    """
    from normlab.report import figures, plots
    from normlab.report.document import latex, markdown
    from normlab.report.drawing import csv_text
    from normlab.report.page import html
    from normlab.run import write_text

    directory = Path(directory)
    sweep = sweep or load(directory)
    drawn = plots.figures(sweep)
    folder = directory / figures.FOLDER
    texts = {
        "report.tex": latex(sweep),
        "report.html": html(sweep, drawn),
        "report.md": markdown(sweep, drawn, f"{figures.FOLDER}/"),
        "report.csv": csv_text(sweep),
    }
    path = folder
    try:
        written = figures.write(drawn.panels(), folder)
        for name, text in texts.items():
            path = directory / name
            write_text(path, text)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise MachineFault(f"{str(path)!r} cannot be written: {reason}") from error
    return Paths(folder if written else None, *(directory / name for name in texts))


def show_paths(paths: Paths, stream: TextIO) -> None:
    """Prints what was written, a line each; of the figures their folder."""
    from normlab.report import drawing

    for path in filter(None, paths):
        drawing.say(f"{path}/" if path == paths.figures else str(path), stream)


def show(sweep: Sweep, stream: TextIO) -> None:
    """Prints the summary, the table and what to beware of: rich on a terminal, else plain text."""
    from normlab.report import drawing, notes, tables

    drawing.say(notes.summary(sweep)[0], stream)
    if sweep.claim is not None:
        drawing.say(f"Claim: {sweep.claim.text}", stream)
    drawing.show(tables.headline(sweep), stream)
    drawing.say(notes.headline(sweep), stream)
    for quantity in sweep.claim.quantities if sweep.claim else ():
        drawing.show(tables.quantity_table(quantity, sweep), stream)
        drawing.say(notes.quantity(quantity.name, sweep), stream)
    claim = [] if sweep.claim is None else [*sweep.claim.sentences, notes.verdict(sweep)]
    for sentence in [
        *notes.footnotes(sweep),
        *notes.warnings(sweep),
        *notes.choices(sweep),
        *claim,
    ]:
        drawing.say(sentence, stream)
