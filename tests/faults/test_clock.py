"""Clocks that run backwards: no number of a run hangs on one, and no second is negative."""

import itertools
import json
import time

import pytest
from fault_tools import assert_same_run, lines, small

from normlab.report.live import LiveRun, refresh
from normlab.training.loop import train


@pytest.mark.parametrize("step", [-7.0, 0.0], ids=["backwards", "standing still"])
def test_a_run_under_such_a_clock_is_the_same_run(whole, tmp_path, monkeypatch, step):
    """All three of Python's; the system's own may be set back, the others by a broken machine."""
    ticks = itertools.count()
    with monkeypatch.context() as patch:
        for name in ("time", "perf_counter", "monotonic"):
            patch.setattr(time, name, lambda: 1e6 + step * next(ticks))
        train(small(), tmp_path / "run")
    assert_same_run(tmp_path / "run", whole, small())
    times = lines(tmp_path / "run", "timing.jsonl")
    assert times
    assert all(value >= 0 for line in times for value in line.values())
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    for name in ("seconds", "compile_seconds", "step_seconds"):
        assert result[name] >= 0
    assert result["examples_per_second"] is None  # no seconds, no speed


def test_a_resumed_run_keeps_the_seconds_of_the_processes_before(own, monkeypatch):
    (own / "result.json").unlink()
    before = lines(own, "timing.jsonl")
    ticks = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: 1e6 - 7.0 * next(ticks))
        result = train(small(), own)
    assert result["seconds"] >= before[-2]["seconds"]


def test_who_watches_a_run_that_was_written_in_the_future_sees_no_negative_time(own):
    (own / "result.json").unlink()
    live = LiveRun(own)
    refresh(live)
    live.state, live.num_steps = "running", 1000
    for now in (live.timing.changed - 3600, live.timing.changed + 1e9):
        assert live.seconds_left(now) >= 0
