"""What curves are drawn against: steps, epochs, training seconds; and a timing.jsonl at fault."""

import json

import numpy as np
import pytest

from normlab.report import load, notes, plots, write
from normlab.report.axis import aligned, axes_of
from normlab.report.page import html
from normlab.report.row import Row

ONE = {"settings": {"base": {}}, "norms": ("batch_norm",)}


def row(path, curve, **facts):
    return Row(setting="", norm="", seed=0, id="", path=path, curve=curve, **facts)


def test_a_step_stands_at_the_mean_of_the_seeds_seconds(tmp_path):
    curve = ((10, 0.5), (20, 0.6))
    rows = [row(tmp_path, curve, seconds=seconds) for seconds in [(1.0, 2.0), (3.0, 6.0)]]
    scale, values = aligned(rows, "seconds")
    assert list(scale) == [2.0, 4.0]  # (1 + 3)/2, (2 + 6)/2
    assert values.tolist() == [[50.0, 60.0], [50.0, 60.0]]


def test_where_a_slow_seed_ends_the_others_go_on_and_never_back(tmp_path):
    slow = row(tmp_path, ((10, 0.5), (20, 0.5)), seconds=(10.0, 20.0))
    fast = row(tmp_path, ((10, 0.5), (20, 0.5), (30, 0.5)), seconds=(2.0, 4.0, 6.0))
    # Means 6 and 12; from step 20 to 30 the one that is left took 2 s: 14, not its own 6.
    assert list(aligned([slow, fast], "seconds").scale) == [6.0, 12.0, 14.0]


def test_a_seed_without_a_point_at_a_step_is_interpolated(tmp_path):
    usual = row(tmp_path, ((10, 0.5), (20, 0.5)), seconds=(1.0, 2.0))
    odd = row(tmp_path, ((14, 0.5),), seconds=(2.8,))
    scale, values = aligned([usual, odd], "seconds")
    # Steps 10, 14, 20. At 10: (1 + 2.8 · 10/14)/2 = 1.5. At 14: (1.4 + 2.8)/2 = 2.1. Then the
    # usual one's 0.6 s.
    assert list(scale) == pytest.approx([1.5, 2.1, 2.7])
    assert np.isnan(values).tolist() == [[False, True, False], [True, False, True]]


def test_epochs_are_steps_over_the_steps_of_an_epoch(tmp_path):
    rows = [row(tmp_path, ((11, 0.5), (44, 0.6)), steps_per_epoch=22)] * 3
    assert list(aligned(rows, "epochs").scale) == [0.5, 2.0]


def test_steps_are_exact(tmp_path):
    steps = (7, 22, 5_000_001)
    rows = [row(tmp_path, tuple((step, 0.5) for step in steps[: 3 - i])) for i in range(3)]
    assert tuple(aligned(rows, "steps").scale) == steps


def test_axes_are_those_that_the_runs_tell(make_sweep, tmp_path):
    told = {"step_seconds": 0.01, "manifest": {"steps_per_epoch": 22}}
    assert axes_of(load(make_sweep(tmp_path / "none", **ONE))) == ["steps"]
    sweep = load(make_sweep(tmp_path / "all", **ONE, run=lambda *_: told))
    assert axes_of(sweep) == ["steps", "epochs", "seconds"]
    first = sweep.rows[0]
    assert first.seconds[:2] == (0.22, 0.44)  # steps 22 and 44
    assert first.steps_per_epoch == 22
    assert "only a rough comparison" in notes.curves(sweep)
    assert "cannot be drawn" not in notes.curves(sweep)


def test_runs_that_do_not_tell_are_left_out_and_counted(make_sweep, tmp_path):
    make_sweep(
        tmp_path,
        **ONE,
        run=lambda s, n, seed: {"step_seconds": 0.01} if seed else {"accuracy": 0.2},
    )
    sweep = load(tmp_path)
    assert (
        "1 of 3 runs cannot be drawn against seconds: their timing.jsonl does not say it."
        in notes.curves(sweep)
    )
    [panel] = plots.curves(sweep, "seconds").values()
    assert [line.curves.values.shape for line in panel.draw.keywords["lines"]] == [(2, 15)]
    # The vertical scale is that of all runs, on every axis.
    [steps] = plots.curves(sweep).values()
    assert panel.draw.keywords["limits"] == steps.draw.keywords["limits"]


def test_the_page_offers_a_choice_only_where_there_is_one(make_sweep, tmp_path):
    alone = html(load(make_sweep(tmp_path / "one", **ONE)))
    assert 'type="radio"' not in alone
    timed = html(load(make_sweep(tmp_path / "two", **ONE, run=lambda *_: {"step_seconds": 0.01})))
    assert timed.count('type="radio"') == 2
    assert '<input type="radio" name="axis" id="axis-steps" checked>' in timed
    assert '<div class="steps"><svg' in timed
    assert '<div class="seconds" hidden><svg' in timed


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00garbage\n" * 40,
        b"[1, 2]\nnull\n7\n",
        b"[" * 100_000,
        b'{"step": 22, "train_seconds": NaN}\n',
        b'{"step": 22, "train_seconds": "1"}\n{"step": 44, "train_seconds": true}\n',
        b'{"step": {"a": [1]}, "train_seconds": 1}\n',
    ],
    ids=["empty", "bytes", "no objects", "deep", "nan", "types", "step"],
)
def test_a_timing_file_of_garbage_is_no_axis_and_no_crash(make_sweep, tmp_path, content):
    sweep = load(make_sweep(tmp_path, **ONE, run=lambda *_: {"step_seconds": 0.01}))
    for damaged in sweep.rows:
        (damaged.path / "timing.jsonl").write_bytes(content)
    assert axes_of(load(tmp_path)) == ["steps"]
    write(tmp_path)


def test_a_cut_off_timing_file_costs_the_run_its_place(make_sweep, tmp_path):
    sweep = load(make_sweep(tmp_path, **ONE, run=lambda *_: {"step_seconds": 0.01}))
    path = sweep.rows[0].path / "timing.jsonl"
    whole = path.read_bytes()
    # The last step has two lines: the first of them says it already.
    path.write_bytes(whole[:-20])
    assert load(tmp_path).rows[0].seconds == sweep.rows[0].seconds
    path.write_bytes(whole[: len(whole) // 2])
    assert load(tmp_path).rows[0].seconds == ()
    write(tmp_path)


def test_seconds_that_run_backwards_are_no_axis(make_sweep, tmp_path):
    sweep = load(make_sweep(tmp_path, **ONE, seeds=(0,), run=lambda *_: {"step_seconds": 0.01}))
    path = sweep.rows[0].path / "timing.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[-1]["train_seconds"] = lines[-2]["train_seconds"] = 0.1
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert load(tmp_path).rows[0].seconds == ()


@pytest.mark.parametrize("value", [0, -3, 2.5, "22", None, True])
def test_steps_per_epoch_that_are_none_are_no_axis(make_sweep, tmp_path, value):
    make_sweep(tmp_path, **ONE, run=lambda *_: {"manifest": {"steps_per_epoch": value}})
    assert axes_of(load(tmp_path)) == ["steps"]
