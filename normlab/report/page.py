"""The report as one HTML page: no network, no script, readable on a phone and in the dark.

Every text that comes from a run folder goes through `escape`; the only markup that does not is
the figures', which hold no text from there.
"""

from html import escape

from normlab.report import notes, plots, tables
from normlab.report.rows import Sweep
from normlab.report.style import style_sheet
from normlab.report.tables import Cell, Table


def html(sweep: Sweep) -> str:
    """Returns the whole page."""
    title = escape(notes.title(sweep))
    first, *rest = notes.summary(sweep)
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="lead">{escape(first)}</p>',
        _list(rest),
        f'<code class="command">{escape(sweep.command)}</code>' if sweep.command else "",
        _beware(notes.warnings(sweep)),
        "<h2>Test accuracy</h2>",
        f'<p class="muted">{notes.HEADLINE}</p>',
        _table(tables.headline(sweep), "headline", under=_overrides(sweep)),
        _curves(sweep),
        "<h2>Three evaluations, and what they cost</h2>",
        f'<p class="muted">{notes.COSTS}</p>',
        _table(tables.costs(sweep), "costs"),
        "<h2>How to read this</h2>",
        _list(notes.reading(sweep)),
        _provenance(sweep),
        "<h2>Runs</h2>",
        _table(tables.run_list(sweep), "runs"),
    ]
    body = "\n".join(filter(None, parts))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # An icon of nothing: without one a browser asks the network.
        '<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>\n{style_sheet()}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _list(sentences: list[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def _beware(warnings: list[str]) -> str:
    if not warnings:
        return ""
    return f'<section class="beware"><h2>Beware</h2>{_list(warnings)}</section>'


def _overrides(sweep: Sweep) -> list[str]:
    """Returns what stands under each column name of the headline table."""
    return ["", *(", ".join(notes.overrides(fields)) for fields in sweep.settings.values())]


def _curves(sweep: Sweep) -> str:
    panels = plots.curves(sweep)
    if not panels:
        return ""
    legend = "".join(
        f"<li>{svg}<span>{escape(norm)}</span></li>" for norm, svg in plots.keys(sweep).items()
    )
    figures = "".join(
        f"<figure><h3>{escape(setting)}</h3>{svg}</figure>" for setting, svg in panels.items()
    )
    return (
        f'<h2>Learning curves</h2>\n<p class="muted">{plots.CAPTION}</p>\n'
        f'<ul class="legend">{legend}</ul>\n<div class="panels">{figures}</div>'
    )


def _provenance(sweep: Sweep) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(what)}</th><td>'
        + "<br>".join(map(escape, notes.counted(values)))
        + "</td></tr>"
        for what, values in notes.provenance(sweep).items()
    )
    if not rows:
        return ""
    return (
        "<h2>What the runs stood on</h2>"
        f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'
    )


# Tables ------------------------------------------------------------------------------------------


def _table(table: Table, name: str, under: list[str] | None = None) -> str:
    """Returns a table in a container that scrolls sideways by itself."""
    kinds = [
        ' class="words"'
        if index < table.num_names or index >= len(table.columns) - table.num_words
        else ""
        for index in range(len(table.columns))
    ]
    under = under or [""] * len(table.columns)
    head = "".join(
        f'<th scope="col"{kind}>{escape(column)}'
        + (f'<span class="override">{escape(extra)}</span>' if extra else "")
        + "</th>"
        for column, kind, extra in zip(table.columns, kinds, under, strict=True)
    )
    lines = []
    for row in table.rows:
        cells = "".join(
            f'<th scope="row"{kind}>{_cell(cell)}</th>'
            if index < table.num_names
            else f"<td{kind}>{_cell(cell)}</td>"
            for index, (cell, kind) in enumerate(zip(row, kinds, strict=True))
        )
        lines.append(f"<tr>{cells}</tr>")
    body = "\n".join(lines)
    return (
        f'<div class="scroll" tabindex="0"><table class="{name}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    if cell.link:
        text = f'<a href="{escape(cell.link)}">{text}</a>'
    kind = f"value {cell.state}" if cell.state else "value"
    parts = [f'<span class="{kind}">{text}</span>']
    if cell.spread:
        parts.append(f'<span class="spread">± {escape(cell.spread)}</span>')
    if cell.detail:
        parts.append(f'<span class="detail">{escape(cell.detail)}</span>')
    parts += [f'<span class="mark">{escape(mark)}</span>' for mark in cell.marks]
    return " ".join(parts)
