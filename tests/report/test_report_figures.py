"""Figures as files: whole, the same again, readable by others, and safe for any name."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from normlab.errors import MachineFault
from normlab.report import canvas, load, plots, write
from normlab.report.style import LIGHT, series

ONE = {"settings": {"base": {}}, "norms": ("batch_norm",)}
TOLD = {"step_seconds": 0.01, "manifest": {"steps_per_epoch": 22}}
SVG = "{http://www.w3.org/2000/svg}"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def texts(path):
    """Returns what is written in an SVG file."""
    return ["".join(text.itertext()).strip() for text in ElementTree.parse(path).iter(f"{SVG}text")]


def test_one_file_an_axis_and_setting_in_both_formats(make_sweep, tmp_path):
    make_sweep(tmp_path, settings={"a": {}, "b": {}}, norms=("none",), run=lambda *_: TOLD)
    folder = write(tmp_path).figures
    stems = [f"curves-{i}{axis}" for i in (0, 1) for axis in ("", "-epochs", "-seconds")]
    assert names(folder) == sorted(
        f"{stem}.{suffix}" for stem in stems for suffix in ("pdf", "svg")
    )


def test_a_file_has_a_legend_and_the_light_pages_colours(make_sweep, tmp_path):
    folder = write(make_sweep(tmp_path, norms=("none", "batch_norm"))).figures
    path = folder / "curves-0.svg"
    assert {"none", "batch_norm", "steps", "test accuracy (%)"} <= set(texts(path))
    svg = path.read_text()
    assert "var(--" not in svg
    assert LIGHT[series(1)] in svg
    assert LIGHT["card"] in svg


def test_the_markdown_shows_the_curves_against_steps(make_sweep, tmp_path):
    page = write(make_sweep(tmp_path, **ONE, run=lambda *_: TOLD)).markdown.read_text()
    assert "![curves-0](figures/curves-0.svg)" in page
    assert "seconds.svg" not in page


def test_a_pdf_embeds_its_font_and_bears_no_date(make_sweep, tmp_path):
    content = (write(make_sweep(tmp_path, **ONE)).figures / "curves-0.pdf").read_bytes()
    assert content.startswith(b"%PDF-")
    assert b"/FontFile2" in content  # TrueType, which is type 42
    assert b"/Subtype /Type3" not in content
    assert b"Date" not in content


def test_equal_bytes_in_another_process(make_sweep, tmp_path):
    """Under another seed of Python's hashes, too: a font's tag could be made from one."""
    folder = write(make_sweep(tmp_path, **ONE)).figures
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code = f"from normlab.report import write; write({str(tmp_path)!r})"
    for seed in "12":
        environment = os.environ | {"PYTHONHASHSEED": seed, "SOURCE_DATE_EPOCH": seed}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "name",
    [
        "$x_1",
        pytest.param("$\\nonsense{$", marks=pytest.mark.slow),
        pytest.param("_under", marks=pytest.mark.slow),
        "</text><script>alert(1)</script>&amp;\"'",
        pytest.param("-->", marks=pytest.mark.slow),
        "漢字 🙂 \u202eabc",
        "a\\b(c)/../..%",
        pytest.param("x" * 300, marks=pytest.mark.slow),
        "\ud800",
    ],
)
@pytest.mark.filterwarnings("error")
def test_any_name_is_drawn_as_it_stands(make_sweep, tmp_path, name):
    settings, norms = {name: {}, "other": {}}, (name, "none")
    make_sweep(tmp_path / "s", settings=settings, norms=norms, seeds=(0,), run=lambda *_: TOLD)
    sweep = load(tmp_path / "s")
    folder = write(tmp_path / "s", sweep).figures
    shown = sweep.norms[0] if len(name) < 44 else "x" * 43 + "…"
    assert shown.strip() in texts(folder / "curves-0.svg")
    assert "<script" not in (folder / "curves-0.svg").read_text()
    assert all(re.fullmatch(r"curves-[01](-\w+)?\.(svg|pdf)", name) for name in names(folder))
    # Nothing was written elsewhere.
    assert names(tmp_path) == ["s"]


def test_an_attack_leaves_whole_files(attacked):
    for path in write(attacked).figures.iterdir():
        if path.suffix == ".svg":
            assert not list(ElementTree.parse(path).iter(f"{SVG}script"))


def test_names_of_files_come_from_no_config(make_sweep, tmp_path):
    make_sweep(tmp_path, settings={"../../x": {}}, norms=("../evil norm", "batch_norm"))
    for run in load(tmp_path).rows:
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 330, "split": "probe", "p15": -1.0, "p50": 0.0, "p85": 1.0}\n')
    panels = plots.percentiles(load(tmp_path)).values()
    assert [panel.name for panel in panels] == ["unit-evilnorm-0", "unit-batch_norm-1"]


def test_a_swept_fields_file_names_the_field(make_sweep, tmp_path):
    make_sweep(
        tmp_path, settings={f"$ghost_size$={size}": {} for size in (32, 2)}, norms=("batch_norm",)
    )
    plan = json.loads((tmp_path / "sweep.json").read_text())
    for entry in plan["runs"]:
        size = int(entry["labels"]["setting"].partition("=")[2])
        entry["labels"]["batch_stats.$ghost_size$"] = size
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    folder = write(tmp_path).figures
    assert "batch_stats.$ghost_size$" in texts(folder / "swept-0.svg")
    # In the page the name is the page's text, not the figure's.
    [element] = canvas.elements(plots.swept(load(tmp_path)).values())
    assert "ghost" not in element


def test_figures_of_an_earlier_report_go_and_others_stay(make_sweep, tmp_path):
    make_sweep(tmp_path, **ONE, run=lambda *_: TOLD)
    folder = write(tmp_path).figures
    for name in ("curves-7.svg", "unit-a_norm-1.pdf", "mine.svg", "curves-x.svg"):
        (folder / name).write_text("")
    for run in load(tmp_path).rows:
        (run.path / "timing.jsonl").unlink()
    write(tmp_path)
    stems = ("curves-0", "curves-0-epochs")
    drawn = [f"{stem}.{suffix}" for stem in stems for suffix in ("pdf", "svg")]
    assert names(folder) == sorted([*drawn, "mine.svg", "curves-x.svg"])


def test_nothing_to_draw_makes_no_folder(make_sweep, tmp_path):
    paths = write(make_sweep(tmp_path, **ONE, run=lambda *_: None))
    assert paths.figures is None
    assert not (tmp_path / "figures").exists()


def test_a_full_disk_is_one_line_and_keeps_the_old_figure(make_sweep, tmp_path, monkeypatch):
    folder = write(make_sweep(tmp_path, **ONE)).figures
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = load(tmp_path).rows[0].path / "metrics.jsonl"
    result.write_text('{"step": 22, "split": "test", "accuracy": 0.5}\n')

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(MachineFault, match=r"figures' cannot be written: No space left"):
        write(tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_runs_of_other_settings_are_no_seeds_of_one_point(make_sweep, tmp_path):
    """slow and fast at each batch size: two panels of two points, not one with both in a mean."""
    names = [f"{rate}, batch_size={size}" for rate in ("slow", "fast") for size in (8, 16)]
    make_sweep(tmp_path, settings={name: {} for name in names}, norms=("batch_norm",))
    plan = json.loads((tmp_path / "sweep.json").read_text())
    for entry in plan["runs"]:
        entry["labels"]["train.batch_size"] = int(entry["labels"]["setting"].rpartition("=")[2])
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    assert list(plots.swept(load(tmp_path))) == [
        ("train.batch_size", "slow"),
        ("train.batch_size", "fast"),
    ]
