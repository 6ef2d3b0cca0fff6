"""The report as one HTML page: no network, one script, readable on a phone and in the dark.

Every text that comes from a run folder goes through `escape`; the only markup that does not is
the figures', which hold no text from there. The script sorts the run list and is the only one that
the page's policy lets a browser run.
"""

from collections.abc import Mapping
from html import escape

from normlab.report import canvas, notes, tables
from normlab.report.canvas import Panel
from normlab.report.differences import baseline_of, differences
from normlab.report.plots import Figures, figures
from normlab.report.published import beside
from normlab.report.row import Sweep
from normlab.report.script import SCRIPT, policy
from normlab.report.style import style_sheet
from normlab.report.tables import Cell, Table


def html(sweep: Sweep, drawn: Figures | None = None, links: bool = True) -> str:
    """Returns the whole page; with `links`, runs are linked to their folders beside it.

    `drawn` is what `figures(sweep)` gave, if the caller has it already.
    """
    drawn = drawn or figures(sweep)
    title = escape(notes.title(sweep))
    first, *rest = notes.summary(sweep)
    parts = [
        f"<h1>{title}</h1>",
        _claim(sweep),
        f'<p class="lead">{escape(first)}</p>',
        _list(rest),
        f'<code class="command">{escape(sweep.command)}</code>' if sweep.command else "",
        _caveats(notes.warnings(sweep)),
        "<h2>Test accuracy</h2>",
        f'<p class="muted">{notes.headline(sweep)}</p>',
        _table(tables.headline(sweep), "headline", under=_overrides(sweep)),
        _choices(sweep),
        _quantities(sweep),
        _published(sweep),
        _curves(sweep, drawn.curves),
        _swept(sweep, drawn.swept),
        _percentiles(sweep, drawn.percentiles),
        _differences(sweep),
        "<h2>Evaluations and cost</h2>",
        f'<p class="muted">{notes.COSTS}</p>',
        _table(tables.costs(sweep), "costs"),
        "<h2>How to read this</h2>",
        _list(notes.reading(sweep)),
        _provenance(sweep),
        _config(sweep),
        "<h2>Runs</h2>",
        _table(tables.run_list(sweep, links), "runs", sortable=True),
    ]
    body = "\n".join(filter(None, parts))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy()}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # An icon of nothing: without one a browser asks the network.
        '<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>\n{style_sheet()}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _list(sentences: list[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def _caveats(warnings: list[str]) -> str:
    if not warnings:
        return ""
    return f'<section class="caveats"><h2>Caveats</h2>{_list(warnings)}</section>'


def _overrides(sweep: Sweep) -> list[list[str]]:
    """Returns what stands under each column name of the headline table, by line."""
    return [[], *(notes.overrides(fields) for fields in sweep.settings.values())]


def _curves(sweep: Sweep, drawn: dict[str, dict[str, Panel]]) -> str:
    """Returns a figure a setting, and a choice of what all of them are drawn against.

    It needs no script. Where the style sheet is not read, `hidden` leaves the curves against steps.
    """
    if not drawn:
        return ""
    first = next(iter(drawn))
    legend = "".join(
        f"<li>{canvas.key(index)}<span>{escape(norm)}</span></li>"
        for index, norm in enumerate(sweep.norms)
    )
    choice = "".join(
        f'<input type="radio" name="axis" id="axis-{axis}"{" checked" * (axis == first)}>'
        f'<label for="axis-{axis}">{axis}</label>'
        for axis in drawn
        if len(drawn) > 1
    )
    svgs = dict.fromkeys(drawn[first], "")
    for axis, panels in drawn.items():
        hidden = "" if axis == first else " hidden"
        for setting, svg in zip(panels, canvas.elements(panels.values()), strict=True):
            svgs[setting] += f'<div class="{axis}"{hidden}>{svg}</div>'
    shown = "".join(
        f"<figure><h3>{escape(setting)}</h3>{all_axes}</figure>"
        for setting, all_axes in svgs.items()
    )
    return (
        f'<h2>Learning curves</h2>\n<p class="muted">{escape(notes.curves(sweep))}</p>\n'
        f'<ul class="legend">{legend}</ul>\n<div class="choice" role="group" '
        f'aria-label="Curves against">{choice}<div class="panels">{shown}</div></div>'
    )


def _claim(sweep: Sweep) -> str:
    claim = sweep.claim
    if claim is None:
        return ""
    kind = claim.outcome.replace(" ", "-")
    kind = kind if kind in ("reproduced", "not-reproduced", "underpowered") else "open"
    return (
        f'<p class="lead">{escape(claim.text)}</p>\n<section class="verdict {kind}">'
        f"<h2>{escape(notes.verdict(sweep))}</h2>{_list(list(claim.sentences))}"
        f'<p class="muted">{escape(claim.test)}</p></section>'
    )


def _choices(sweep: Sweep) -> str:
    chosen = notes.choices(sweep)
    return f"<h3>Chosen on the validation split</h3>{_list(chosen)}" if chosen else ""


def _quantities(sweep: Sweep) -> str:
    parts = []
    for found in sweep.claim.quantities if sweep.claim else ():
        parts.append(f'<p class="muted">{escape(notes.quantity(found.name, sweep))}</p>')
        parts.append(_table(tables.quantity_table(found, sweep), "quantity"))
    return "\n".join(["<h2>Quantities</h2>", *parts]) if parts else ""


def _published(sweep: Sweep) -> str:
    parts = []
    for table in sweep.claim.published if sweep.claim else ():
        caption = escape(" ".join(notes.published(table)))
        drawn = beside(sweep, table)
        parts.append(f'<p class="muted">{caption}</p>')
        parts += [_table(drawn, "published")] if drawn.rows else []
    return "\n".join(["<h2>The paper's numbers beside ours</h2>", *parts]) if parts else ""


def _differences(sweep: Sweep) -> str:
    table = differences(sweep)
    if not table.rows:
        return ""
    caption = escape(notes.differences(sweep, baseline_of(sweep), len(table.rows)))
    drawn = _table(table, "differences")
    return f'<h2>Paired differences</h2>\n<p class="muted">{caption}</p>\n{drawn}'


def _swept(sweep: Sweep, panels: dict[tuple[str, str], Panel]) -> str:
    if not panels:
        return ""
    shown = "".join(
        f"<figure><h3>{escape(f'{field} ({others})' if others else field)}</h3>{svg}</figure>"
        for (field, others), svg in zip(panels, canvas.elements(panels.values()), strict=True)
    )
    return (
        f'<h2>Error against what was swept</h2>\n<p class="muted">{notes.swept(sweep)}</p>\n'
        f'<div class="panels">{shown}</div>'
    )


def _percentiles(sweep: Sweep, panels: dict[tuple[str, str], Panel]) -> str:
    if not panels:
        return ""
    many = len(sweep.settings) > 1
    shown = "".join(
        f"<figure><h3>{escape(f'{norm} in {setting}' if many else norm)}</h3>{svg}</figure>"
        for (setting, norm), svg in zip(panels, canvas.elements(panels.values()), strict=True)
    )
    return (
        f'<h2>One unit over training</h2>\n<p class="muted">{escape(notes.probe(sweep))}</p>\n'
        f'<div class="panels">{shown}</div>'
    )


def _provenance(sweep: Sweep) -> str:
    facts = {what: notes.counted(values) for what, values in notes.provenance(sweep).items()}
    return f"<h2>Provenance</h2>{_facts(facts)}" if facts else ""


def _config(sweep: Sweep) -> str:
    """Returns the fields in which the runs' configs differ, and behind a click all the others."""
    differing, common = notes.config(sweep)
    if not common:
        return ""
    shown = {name: notes.counted(values) for name, values in differing.items()}
    rest = _facts({name: [value] for name, value in common.items()})
    return (
        "<h2>Configs</h2>"
        + (f'<p class="muted">Fields in which the runs differ.</p>{_facts(shown)}' if shown else "")
        + f"<details><summary>{len(common)} fields are the same in all runs</summary>{rest}"
        "</details>"
    )


def _facts(facts: Mapping[str, list[str]]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(what)}</th><td>{"<br>".join(map(escape, values))}</td></tr>'
        for what, values in facts.items()
    )
    return f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'


# Tables ------------------------------------------------------------------------------------------


def _table(
    table: Table, name: str, under: list[list[str]] | None = None, sortable: bool = False
) -> str:
    """Returns a table in a container that scrolls sideways by itself.

    `under` is small print under each column's name. Of two columns of names the first becomes a
    heading over its rows, so that the second stays in sight on a phone. A `sortable` table has that
    column as well, not shown until the script has sorted the rows away from their headings.
    """
    grouped = table.num_names == 2
    columns = table.columns[grouped:]
    under = under or [[] for _ in columns]
    kinds = [
        ' class="words"' if index in table.words else ""
        for index in range(grouped, len(table.columns))
    ]
    classes = f"{name} grouped" if sortable else name
    heads = [
        f'<th scope="col"{kind}>{escape(column)}'
        + "".join(f'<span class="override">{escape(line)}</span>' for line in lines)
        + "</th>"
        for column, kind, lines in zip(columns, kinds, under, strict=True)
    ]
    if sortable:
        heads.insert(1, f'<th scope="col" class="words heading">{escape(table.columns[0])}</th>')
    head = "".join(heads)
    body = []
    heading = None
    for row in table.rows:
        if grouped and row[0] != heading:
            heading = row[0]
            body.append(
                f'<tr class="group"><th colspan="{len(columns)}" scope="rowgroup">'
                f"<span>{escape(heading.text)}</span></th></tr>"
            )
        first, *rest = row[grouped:]
        cells = f'<td class="words heading">{_cell(row[0])}</td>' if sortable else ""
        cells += "".join(
            f"<td{kind}>{_cell(cell)}</td>" for cell, kind in zip(rest, kinds[1:], strict=True)
        )
        body.append(f'<tr><th scope="row" class="words">{_cell(first)}</th>{cells}</tr>')
    rows = "\n".join(body)
    return (
        f'<div class="scroll" tabindex="0"><table class="{classes}">'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    if cell.link:
        text = f'<a href="{escape(cell.link)}">{text}</a>'
    kind = " ".join(filter(None, ("value", cell.state, "strong" if cell.strong else "")))
    parts = [f'<span class="{kind}">{text}</span>']
    if cell.spread:
        parts.append(f'<span class="spread">{escape(cell.spread)}</span>')
    if cell.detail:
        parts.append(f'<span class="detail">{escape(cell.detail)}</span>')
    parts += [f'<span class="mark">{escape(mark)}</span>' for mark in cell.marks]
    return " ".join(parts)
