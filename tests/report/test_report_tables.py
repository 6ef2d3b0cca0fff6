"""Cells and tables: what is averaged, what is marked, and how it is written."""

import csv
import io
import shutil
import subprocess
from dataclasses import replace

import pytest

from normlab.report import drawing, tables
from normlab.report.document import latex, markdown
from normlab.report.notes import footnotes, summary
from normlab.report.rows import load

ONE = {"settings": {"base": {}}, "norms": ("batch_norm",)}


@pytest.fixture
def cell(make_sweep, tmp_path):
    """Returns the table's cell for runs given as (state, accuracy), or None for a planned one."""

    def make(*runs):
        def run(setting, norm, seed):
            return runs[seed] and {"state": runs[seed][0], "accuracy": runs[seed][1]}

        make_sweep(tmp_path, **ONE, seeds=tuple(range(len(runs))), run=run)
        return str(tables.headline(load(tmp_path)).rows[0][1])

    return make


def test_mean_and_half_width_in_percent(cell):
    # s = 1 point, so the half-width is t(0.975, 2) / sqrt(3) = 2.484 points.
    assert cell(("done", 0.97), ("done", 0.98), ("done", 0.99)) == "98.00 ± 2.48 n=3"


def test_one_seed_shows_no_interval(cell):
    assert cell(("done", 0.98)) == "98.00 n=1"


def test_a_measured_diverged_run_counts_and_is_marked(cell):
    # Mean (90 + 90 + 30) / 3 = 70; s = sqrt(2 * 20^2 + 40^2) / sqrt(2) = 34.641;
    # 34.641 * 2.484138 = 86.05. A wide interval has one decimal.
    runs = ("done", 0.9), ("diverged", 0.3), ("done", 0.9)
    assert cell(*runs) == "70.0 ± 86.1 n=3 (1/3 diverged)"


def test_a_diverged_run_without_measurement_is_marked(cell):
    runs = ("done", 0.9), ("diverged", None), ("done", 0.9)
    assert cell(*runs) == "90.00 n=2 (1/3 diverged)"


def test_all_diverged_without_measurement(cell):
    assert cell(*[("diverged", None)] * 3) == "diverged (3/3)"


def test_unfinished_runs_have_no_part_and_are_marked(cell):
    # The file of a failed or interrupted run may hold any number; none of them is final.
    runs = ("done", 0.9), ("failed", 0.1), ("interrupted", 0.1), ("running", 0.1), None
    expected = "90.00 n=1 (1/5 failed, 1/5 interrupted, 1/5 running, 1/5 planned)"
    assert cell(*runs) == expected


def test_nothing_measured_in_several_ways(cell):
    assert cell(("failed", 0.1), None) == "– n=0 (1/2 failed, 1/2 planned)"


def test_a_done_run_whose_result_is_lost_is_marked(make_sweep, tmp_path):
    (load(make_sweep(tmp_path, **ONE)).rows[0].path / "result.json").unlink()
    assert "n=2 (1/3 without result)" in str(tables.headline(load(tmp_path)).rows[0][1])


def test_shared_cells_carry_a_dagger_and_a_footnote(make_sweep, tmp_path):
    sweep = load(make_sweep(tmp_path))
    table = tables.headline(sweep)
    assert table.columns == ("normalizer", "base", "lr x5", "ghost 1")
    daggers = {row[0].text: [tables.DAGGER in str(cell) for cell in row[1:]] for row in table.rows}
    assert daggers["layer_norm"] == [False, False, True]
    assert daggers["batch_norm"] == [False, False, False]
    [note] = footnotes(sweep)
    assert "In ghost 1: the very runs of base" in note


def test_the_summary_counts_each_run_once(make_sweep, tmp_path):
    first, *rest = summary(load(make_sweep(tmp_path)))
    # 6 x 3 x 3 = 54 entries, of which 4 stateless normalizers x 3 seeds share: 42 runs.
    assert first == "6 normalizers in 3 settings, 3 seeds each: 42 runs, all done."
    assert len(rest) == 3


def test_costs_are_medians(make_sweep, tmp_path):
    table = tables.costs(load(make_sweep(tmp_path, **ONE)))
    cells = dict(zip(table.columns, map(str, table.rows[0]), strict=True))
    # Made-up steps of 6.1, 6.2 and 6.3 ms, and totals of 2.5, 2.6 and 2.7 s.
    assert cells["step (ms)"] == "6.20"
    assert cells["total (s)"] == "2.60"
    assert cells["compile (s)"] == "1.50"
    assert cells["parameters"] == "28,170"
    assert cells["runs"] == "3 done"


def test_three_evaluations_only_where_there_is_state(make_sweep, tmp_path):
    norms = ("none", "batch_norm")
    sweep = load(make_sweep(tmp_path, settings={"base": {}}, norms=norms, seeds=(0,)))
    table = tables.costs(sweep)
    stateless, stateful = ([str(cell) for cell in row[2:5]] for row in table.rows)
    assert stateless[1:] == ["–", "–"]
    accuracy = 100 * sweep.cell("base", "batch_norm")[0].number("test_accuracy")
    # The made-up runs evaluate 0.2 and 0.1 points higher.
    assert stateful == [f"{accuracy + extra:.2f}" for extra in (0, 0.2, 0.1)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00123, "0.001"),
        (0.5, "0.500"),
        (0.9996, "1.00"),
        (1.234, "1.23"),
        (9.996, "10.0"),
        (99.96, "100"),
        (1234.4, "1,234"),
    ],
)
def test_seconds_have_three_significant_digits(value, text):
    assert tables.significant(value) == text


def test_csv_has_a_line_per_run_and_setting_at_full_precision(make_sweep, tmp_path):
    sweep = load(make_sweep(tmp_path, norms=("none", "batch_norm")))
    rows = list(csv.DictReader(io.StringIO(drawing.csv_text(sweep))))
    assert len(rows) == 18
    for line, row in zip(rows, sweep.rows, strict=True):
        assert (line["setting"], line["norm"], int(line["seed"])) == (
            row.setting,
            row.norm,
            row.seed,
        )
        assert float(line["test_accuracy"]) == row.number("test_accuracy")
    assert {line["shared_with"] for line in rows} == {"", "base"}
    assert rows[0]["git_commit"] == "000000000000"
    assert rows[0]["jax"] == "0.10.2"


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("+x", "'+x"),
        ("-x", "'-x"),
        ("-0.5", "-0.5"),
        ("+1e-3", "+1e-3"),
        ("a=1", "a=1"),
    ],
)
def test_no_cell_of_a_csv_is_a_formula(make_sweep, tmp_path, text, cell):
    sweep = load(make_sweep(tmp_path, settings={text: {}}, norms=("none",), seeds=(0,)))
    [row] = csv.DictReader(io.StringIO(drawing.csv_text(sweep)))
    assert row["setting"] == cell


def test_a_negative_number_of_a_csv_stays_one(make_sweep, tmp_path):
    sweep = load(make_sweep(tmp_path, norms=("none",), seeds=(0,)))
    row = replace(sweep.rows[0], result={"=x": -0.5}, labels={"=y": "-2"})
    [line] = csv.DictReader(io.StringIO(drawing.csv_text(replace(sweep, rows=(row,)))))
    assert (line["'=x"], line["'=y"]) == ("-0.5", "-2")


def test_names_cannot_break_a_markdown_table(make_sweep, tmp_path):
    name = "a|b <b>_x_ [l](http://x) `c`"
    sweep = load(make_sweep(tmp_path, settings={name: {}}, norms=(name,), seeds=(0,)))
    header = next(line for line in markdown(sweep).splitlines() if line.startswith("| normalizer"))
    assert header == r"| normalizer | a\|b &lt;b&gt;\_x\_ \[l\](http://x) \`c\` |"


def test_markdown_leaves_underscores_inside_words(make_sweep, tmp_path):
    assert "| batch_norm |" in markdown(load(make_sweep(tmp_path, **ONE)))


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Latin(io.StringIO):
    encoding = "ascii"


def test_plain_text_is_aligned(make_sweep, tmp_path):
    stream = io.StringIO()
    drawing.show(tables.headline(load(make_sweep(tmp_path))), stream)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 7
    assert len({line.index("97.9" if "97.9" in line else "98.") for line in lines[2:5]}) == 1


def test_a_terminal_that_cannot_write_the_sign_gets_a_question_mark(make_sweep, tmp_path):
    stream = Latin()
    drawing.show(tables.headline(load(make_sweep(tmp_path))), stream)
    assert "98.08 ? 0.23 n=3" in stream.getvalue()


def test_rich_reads_no_markup_in_names(make_sweep, tmp_path):
    settings, norms = {"[red]s[/red]": {}}, ("[/nonsense]",)
    sweep = load(make_sweep(tmp_path, settings=settings, norms=norms, seeds=(0,)))
    stream = Terminal()
    drawing.show(tables.headline(sweep), stream)
    assert "[red]s[/red]" in stream.getvalue()
    assert "[/nonsense]" in stream.getvalue()


def test_control_characters_do_not_reach_a_terminal(make_sweep, tmp_path):
    sweep = load(make_sweep(tmp_path, settings={"a\x1b[2Jb\nc": {}}, norms=("none",), seeds=(0,)))
    assert list(sweep.settings) == ["a\N{REPLACEMENT CHARACTER}[2Jb c"]


def test_latex_escapes_what_latex_would_read(make_sweep, tmp_path):
    name = r"a_b & 50% of {x}\y ~^ #$"
    sweep = load(make_sweep(tmp_path, settings={name: {}}, norms=("batch_norm",), seeds=(0,)))
    lines = drawing.latex_table(tables.headline(sweep)).splitlines()
    assert lines[0] == r"\begin{tabular}{lr}"
    assert lines[2] == (
        r"normalizer & a\_b \& 50\% of \{x\}\textbackslash{}y "
        r"\textasciitilde{}\textasciicircum{} \#\$ \\"
    )
    assert lines[4].startswith(r"batch\_norm & ")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_latex_takes_the_table(make_sweep, tmp_path):
    table = latex(load(make_sweep(tmp_path)))
    start = r"\documentclass{article}\usepackage{booktabs}\begin{document}"
    (tmp_path / "t.tex").write_text(start + table + r"\end{document}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)


def test_the_latex_file_has_all_tables_and_bold_where_decided(make_sweep, tmp_path):
    def run(setting, norm, seed):
        start, rise = {"batch_norm": (0.90, 0.010), "layer_norm": (0.92, 0.011)}[norm]
        return {"accuracy": start + rise * seed}

    norms = ("batch_norm", "layer_norm")
    text = latex(load(make_sweep(tmp_path, settings={"base": {}}, norms=norms, run=run)))
    assert [line for line in text.splitlines() if line.startswith("%")] == [
        "% Test accuracy (%)",
        "% Paired differences (points)",
    ]
    assert r"\textbf{+2.10 $\pm$ 0.25}" in text
    assert text.count(r"\toprule") == 2
