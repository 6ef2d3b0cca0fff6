"""The page: escaping, bytes, curves, colours. What a browser shows: test_report_browser.py."""

import html as html_module
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from normlab.errors import MachineFault
from normlab.report import canvas, load, plots, write
from normlab.report.axis import aligned
from normlab.report.page import html
from normlab.report.script import SCRIPT
from normlab.report.style import DARK, LIGHT, NUM_SERIES, series

ONE = {"settings": {"base": {}}, "norms": ("batch_norm",)}


def test_every_name_is_escaped(attacked, attack):
    paths = write(attacked)
    page = paths.html.read_text()
    assert page.count(html_module.escape("<script>alert(1)</script>")) > 10
    assert re.findall(r"<script.*?</script>", page, flags=re.DOTALL | re.IGNORECASE) == [
        f"<script>{SCRIPT}</script>"
    ]
    assert page.lower().count("<script") == 1
    assert "<img" not in page
    assert not re.search(r"<[^>]*\sonerror", page)
    text = paths.markdown.read_text().replace(f"    {attack}\n", "")  # the command, shown as code
    assert "<script" not in text
    assert "<img" not in text


def test_the_page_needs_no_network(make_sweep, tmp_path):
    page = html(load(make_sweep(tmp_path)))
    targets = set(re.findall(r'(?:src|href)="([^"]*)"', page))
    outside = {
        target for target in targets if not re.fullmatch(r"data:,|#.*|[0-9a-f]{12}/", target)
    }
    assert not outside
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_links_lead_to_the_runs(make_sweep, tmp_path):
    sweep = load(make_sweep(tmp_path, run=lambda s, norm, seed: None if seed == 2 else {}))
    page = html(sweep)
    for row in sweep.rows:
        assert (f'href="{row.id}/"' in page) == (row.state != "planned")


def test_regenerated_byte_for_byte(make_sweep, tmp_path):
    import matplotlib

    def texts(directory: Path) -> list[bytes]:
        figures, *pages = write(directory)
        return [path.read_bytes() for path in [*sorted(figures.iterdir()), *pages]]

    first = texts(make_sweep(tmp_path / "one"))
    assert texts(tmp_path / "one") == first
    # Neither the folder's place and time nor the user's matplotlib settings matter.
    shutil.copytree(tmp_path / "one", tmp_path / "elsewhere" / "two", copy_function=shutil.copy)
    with matplotlib.rc_context({"lines.linewidth": 9, "svg.fonttype": "path", "font.size": 20}):
        assert texts(tmp_path / "elsewhere" / "two") == first
    assert str(tmp_path).encode() not in b"".join(first)


def test_other_bytes_for_other_results(make_sweep, tmp_path):
    before = html(load(make_sweep(tmp_path, **ONE)))
    result = load(tmp_path).rows[0].path / "result.json"
    result.write_text(result.read_text().replace('"test_accuracy": 0.9', '"test_accuracy": 0.8'))
    assert html(load(tmp_path)) != before


def test_writes_only_its_four_files_and_the_figures(make_sweep, tmp_path):
    before = set(make_sweep(tmp_path).rglob("*"))
    figures, *paths = write(tmp_path)
    assert [path.name for path in paths] == ["report.tex", "report.html", "report.md", "report.csv"]
    assert set(tmp_path.rglob("*")) - before == {figures, *figures.iterdir(), *paths}
    assert {path.suffix for path in figures.iterdir()} == {".svg", ".pdf"}


def test_a_full_disk_is_one_line_and_keeps_the_old_report(make_sweep, tmp_path, monkeypatch):
    paths = write(make_sweep(tmp_path, **ONE))
    old = paths.html.read_bytes()

    def full(path: Path, content: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("normlab.run.write_text", full)
    with pytest.raises(MachineFault, match=r"report\.tex' cannot be written: No space left"):
        write(tmp_path)
    assert paths.html.read_bytes() == old


def test_one_panel_per_setting_with_curves(make_sweep, tmp_path):
    sweep = load(make_sweep(tmp_path, run=lambda setting, *_: None if setting == "lr x5" else {}))
    assert list(plots.curves(sweep)) == ["base", "ghost 1"]


def test_ids_in_the_page_are_unique(make_sweep, tmp_path):
    page = html(load(make_sweep(tmp_path)))
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids)) > 100
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', page)) <= set(ids)


def test_figures_take_their_colours_from_the_page(make_sweep, tmp_path):
    sweep = load(make_sweep(tmp_path))
    elements = [*canvas.elements(plots.curves(sweep).values()), *map(canvas.key, range(6))]
    figures = "".join(elements)
    assert not re.findall(
        r"#[0-9a-f]{6}\b(?!-)", re.sub(r'"[^"]*#[^"]*"|url\([^)]*\)', "", figures)
    )
    used = set(re.findall(r"var\(--([\w-]+)\)", figures))
    assert used <= LIGHT.keys()
    assert {series(index) for index in range(6)} <= used


def test_no_two_normalizers_look_alike():
    styles = [canvas.style(index) for index in range(28)]
    looks = {(style["color"], str(style["linestyle"]), style["marker"]) for style in styles}
    assert len(looks) == 28
    # Without colour, neighbours still differ.
    assert all(
        a["marker"] != b["marker"] and a["linestyle"] != b["linestyle"] for a, b in pairwise(styles)
    )


def test_mean_and_band_end_with_the_first_seed(make_sweep, tmp_path):
    # Seeds of 15, 15 and 5 lines: the mean has 5 points, and two seeds go on alone.
    make_sweep(tmp_path, **ONE, run=lambda s, n, seed: {"num_lines": 5 if seed == 2 else 15})
    sweep = load(tmp_path)
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    states = [row.state for row in sweep.rows]
    plots._draw_line(axes, plots.Line(0, aligned(sweep.rows, "steps"), states))
    mean, *seeds = axes.get_lines()
    assert list(mean.get_xdata()) == [22, 44, 66, 88, 110]
    by_hand = [sum(row.curve[point][1] for row in sweep.rows) / 3 for point in range(5)]
    assert list(mean.get_ydata()) == pytest.approx([100 * value for value in by_hand])
    assert [list(line.get_xdata())[:1] for line in seeds] == [[110], [110]]
    assert [list(line.get_xdata())[-1] for line in seeds] == [330, 330]


def test_seeds_without_a_common_step_are_drawn_alone(make_sweep, tmp_path):
    sweep = load(make_sweep(tmp_path, **ONE, seeds=(0, 1)))
    metrics = sweep.rows[1].path / "metrics.jsonl"
    metrics.write_text('{"step": 5, "split": "test", "accuracy": 0.5}\n')
    [svg] = canvas.elements(plots.curves(load(tmp_path)).values())
    assert svg.startswith("<svg")


@pytest.mark.parametrize("accuracies", [(1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0.0, 1.0, 0.5)])
def test_curves_at_the_ends_of_the_scale(make_sweep, tmp_path, accuracies):
    make_sweep(tmp_path, **ONE, run=lambda s, n, seed: {"accuracy": accuracies[seed]})
    [svg] = canvas.elements(plots.curves(load(tmp_path)).values())
    assert "nan" not in svg
    assert "inf" not in svg


def _luminance(colour: str) -> float:
    """WCAG 2.1, relative luminance."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_stand_out(palette):
    """WCAG 2.1 asks 3:1 of graphics and 4.5:1 of text."""
    for index in range(NUM_SERIES):
        assert _contrast(palette[series(index)], palette["card"]) >= 3, index
    for text in ("ink", "muted", "link", "good", "bad", "wait"):
        assert _contrast(palette[text], palette["card"]) >= 4.5, text
    assert _contrast(palette["ink"], palette["bad-card"]) >= 4.5


def test_the_measure_of_contrast():
    assert _contrast("#ffffff", "#000000") == pytest.approx(21)


def test_error_against_a_swept_field_has_a_panel_and_a_word_has_none(make_sweep, tmp_path):
    settings = {f"ghost_size={size}": {} for size in (32, 2)}
    make_sweep(tmp_path, settings=settings, norms=("batch_norm", "none"))
    path = tmp_path / "sweep.json"
    plan = json.loads(path.read_text())
    for entry in plan["runs"]:
        size = int(entry["labels"]["setting"].partition("=")[2])
        entry["labels"] |= {"batch_stats.ghost_size": size, "optim.schedule": "cosine"}
    path.write_text(json.dumps(plan))
    assert list(plots.swept(load(tmp_path))) == [
        ("batch_stats.ghost_size", "optim.schedule=cosine")
    ]
    assert "Error against what was swept" in html(load(tmp_path))


def test_a_sweep_of_named_settings_has_no_such_panel(make_sweep, tmp_path):
    assert plots.swept(load(make_sweep(tmp_path))) == {}
