"""The report as Markdown, for a repository or an issue, and its tables for LaTeX."""

from collections.abc import Iterable

from normlab.report import notes, tables
from normlab.report.differences import baseline_of, differences
from normlab.report.drawing import escape_markdown, latex_table, markdown_table
from normlab.report.plots import Figures
from normlab.report.published import beside
from normlab.report.row import Sweep


def markdown(
    sweep: Sweep, drawn: Figures | None = None, folder: str = "", links: bool = True
) -> str:
    """Returns the page's tables and sentences, and links to figures drawn into `folder` beside it.

    Of the learning curves those against steps are shown. `links`: runs are linked to their folders.
    """
    first, *rest = notes.summary(sweep)
    warnings = notes.warnings(sweep)
    chosen = notes.choices(sweep)
    settings = [
        f"{name}: {', '.join(notes.overrides(fields))}"
        for name, fields in sweep.settings.items()
        if fields
    ]
    parts = [
        f"# {escape_markdown(notes.title(sweep))}",
        *_claim(sweep),
        escape_markdown(first),
        # Indented under a paragraph, a line is code and shows as it stands.
        f"    {sweep.command}" if sweep.command else "",
        _list(rest),
        "## Caveats" if warnings else "",
        _list(warnings),
        "## Test accuracy",
        escape_markdown(notes.headline(sweep)),
        markdown_table(tables.headline(sweep)),
        _list(settings),
        *(["Chosen on the validation split:", _list(chosen)] if chosen else []),
        *_quantities(sweep),
        *_published(sweep),
        *_differences(sweep),
        *(_figures(sweep, drawn, folder) if drawn else []),
        "## Evaluations and cost",
        escape_markdown(notes.COSTS),
        markdown_table(tables.costs(sweep)),
        "## How to read this",
        _list(notes.reading(sweep)),
        "## Provenance",
        _list(
            f"{what}: {', '.join(notes.counted(values))}"
            for what, values in notes.provenance(sweep).items()
        ),
        *_config(sweep),
        "## Runs",
        markdown_table(tables.run_list(sweep, links)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def latex(sweep: Sweep) -> str:
    """Returns the headline, the paper's numbers and the paired differences, each after a comment.

    Tables for LaTeX with the package booktabs, to be pasted one by one.
    """
    named = {"Test accuracy (%)": tables.headline(sweep)}
    for found in sweep.claim.quantities if sweep.claim else ():
        named[found.name] = tables.quantity_table(found, sweep)
    for number, table in enumerate(sweep.claim.published if sweep.claim else (), 1):
        named[f"Published numbers, table {number}"] = beside(sweep, table)
    named["Paired differences (points)"] = differences(sweep)
    drawn = (f"% {name}\n{latex_table(table)}" for name, table in named.items() if table.rows)
    return "\n".join(drawn)


def _config(sweep: Sweep) -> list[str]:
    differing, common = notes.config(sweep)
    if not common:
        return []
    lines = [f"{name}: {', '.join(notes.counted(values))}" for name, values in differing.items()]
    same = ", ".join(f"{name}={value}" for name, value in common.items())
    return ["## Configs", _list(lines), escape_markdown(f"The same in all runs: {same}.")]


def _claim(sweep: Sweep) -> list[str]:
    claim = sweep.claim
    if claim is None:
        return []
    return [
        escape_markdown(claim.text),
        f"**{escape_markdown(notes.verdict(sweep))}**",
        _list(claim.sentences),
        escape_markdown(claim.test),
    ]


def _figures(sweep: Sweep, drawn: Figures, folder: str) -> list[str]:
    curves = drawn.curves.get("steps", {})
    shown = [*curves.values(), *drawn.swept.values(), *drawn.percentiles.values()]
    parts = [
        f"{escape_markdown(panel.title)}:\n\n![{panel.name}]({folder}{panel.name}.svg)"
        for panel in shown
    ]
    caption = [escape_markdown(notes.curves(sweep))] if curves else []
    return ["## Figures", *caption, *parts] if parts else []


def _quantities(sweep: Sweep) -> list[str]:
    parts = []
    for found in sweep.claim.quantities if sweep.claim else ():
        parts.append(escape_markdown(notes.quantity(found.name, sweep)))
        parts.append(markdown_table(tables.quantity_table(found, sweep)))
    return ["## Quantities", *parts] if parts else []


def _published(sweep: Sweep) -> list[str]:
    parts = []
    for table in sweep.claim.published if sweep.claim else ():
        caption = " ".join(notes.published(table))
        drawn = beside(sweep, table)
        parts.append(escape_markdown(caption))
        parts += [markdown_table(drawn)] if drawn.rows else []
    return ["## The paper's numbers beside ours", *parts] if parts else []


def _differences(sweep: Sweep) -> list[str]:
    table = differences(sweep)
    if not table.rows:
        return []
    caption = notes.differences(sweep, baseline_of(sweep), len(table.rows))
    return ["## Paired differences", escape_markdown(caption), markdown_table(table)]


def _list(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {escape_markdown(sentence)}" for sentence in sentences)
