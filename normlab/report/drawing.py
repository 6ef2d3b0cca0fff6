"""Tables as Markdown, CSV and plain or coloured text for a terminal."""

import csv
import io
import re
from typing import Any, TextIO

from normlab.report.files import as_number
from normlab.report.row import Sweep
from normlab.report.tables import Cell, Table

_RESULT_ORDER = (
    "test_accuracy",
    "test_accuracy_batch_statistics",
    "test_accuracy_recomputed_statistics",
    "test_loss",
    "train_loss",
    "steps",
    "step_seconds",
    "compile_seconds",
    "seconds",
    "examples_per_second",
    "num_params",
    "peak_memory_bytes",
    "step_memory_bytes",
)


def markdown_table(table: Table) -> str:
    """Returns a table of GitHub's Markdown; names cannot break out of their cell."""
    aligned = ["---" if index in table.words else "--:" for index in range(len(table.columns))]
    lines = [map(escape_markdown, table.columns), aligned]
    lines += [map(_markdown_cell, row) for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(cell: Cell) -> str:
    text = escape_markdown(str(cell))
    text = f"**{text}**" if cell.strong else text
    return f"[{text}]({cell.link})" if cell.link else text


def escape_markdown(text: str) -> str:
    """Returns text that Markdown shows as it stands."""
    for char in "\\`*[]|~$":
        text = text.replace(char, f"\\{char}")
    # Inside a word an underscore means nothing, and batch_norm reads better than batch\_norm.
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "†": r"$\dagger$",
    **{char: f"\\{char}" for char in "&%$#_{}"},
}


def latex_table(table: Table) -> str:
    """Returns a table for LaTeX with the package booktabs."""
    places = range(len(table.columns))
    aligned = "".join("l" if place in table.words else "r" for place in places)
    lines = [list(map(escape_latex, table.columns)), *(map(_latex_cell, row) for row in table.rows)]
    head, *rows = (" & ".join(line) + r" \\" for line in lines)
    parts = [rf"\begin{{tabular}}{{{aligned}}}", r"\toprule", head, r"\midrule", *rows]
    return "\n".join([*parts, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _latex_cell(cell: Cell) -> str:
    text = escape_latex(str(cell))
    return rf"\textbf{{{text}}}" if cell.strong else text


def escape_latex(text: str) -> str:
    """Returns text that LaTeX shows as it stands."""
    return "".join(_LATEX.get(char, char) for char in text)


def csv_text(sweep: Sweep) -> str:
    """Returns one line per run and setting, full precision, every label, metric and version."""
    labels = list(dict.fromkeys(key for row in sweep.rows for key in row.labels))
    found = {key for row in sweep.rows for key in row.result}
    metrics = [*(key for key in _RESULT_ORDER if key in found), *sorted(found - {*_RESULT_ORDER})]
    made_with = list(dict.fromkeys(key for row in sweep.rows for key in row.provenance))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    what = ("setting", "norm", "tuned", "seed", "id", "shared_with", "state", "step")
    versions = [key.replace(" ", "_") for key in made_with]
    heads = [*what, *labels, *metrics, *versions, "message", "notes"]
    writer.writerow(map(_inert, heads))
    for row in sweep.rows:
        line = [getattr(row, name) for name in what]
        line += [row.labels.get(key, "") for key in labels]
        line += [row.result.get(key, "") for key in metrics]
        line += [row.provenance.get(key, "") for key in made_with]
        writer.writerow(map(_inert, [*line, row.message, "; ".join(row.notes)]))
    return stream.getvalue()


def _inert(value: Any) -> Any:
    """Returns a cell that a spreadsheet shows: text that it would compute begins with a quote."""
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@"))
    return f"'{value}" if formula and as_number(value) is None else value


def show(table: Table, stream: TextIO) -> None:
    """Prints a table: through rich on a terminal, aligned plain text elsewhere."""
    if stream.isatty():
        _show_rich(table, stream)
        return
    grid = [list(table.columns), *([str(cell) for cell in row] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    for line in grid:
        padded = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        say("  ".join(padded).rstrip(), stream)


def say(line: str, stream: TextIO) -> None:
    """Prints a line, with `?` for what the stream's encoding has no character for."""
    encoding = stream.encoding or "utf-8"
    stream.write(line.encode(encoding, "replace").decode(encoding) + "\n")


def _show_rich(table: Table, stream: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(box=box.SIMPLE_HEAD, header_style="bold")
    for index, column in enumerate(table.columns):
        drawn.add_column(Text(column), style="bold" if index < table.num_names else "")
    for row in table.rows:
        # Text, not str: rich would read square brackets in a name as markup.
        drawn.add_row(*(Text(str(cell), style="red" if _alarms(cell) else "") for cell in row))
    Console(file=stream).print(drawn)


def _alarms(cell: Cell) -> bool:
    return bool(cell.marks) or cell.state in ("diverged", "failed")
