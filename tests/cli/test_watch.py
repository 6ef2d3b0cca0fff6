"""What `normlab watch` shows, at which width, and when it ends."""

import fcntl
import io
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from rich.console import Console

from normlab import run
from normlab.cli.watch import curve, duration, view
from normlab.report.live import LiveRun, Watched

WATCH = [sys.executable, "-m", "normlab", "watch"]


def live(norm="batch_norm", seed=0, folder=Path("/nowhere"), **fields):
    given = {"setting": "base", "state": "done", "step": 50, "num_steps": 200, **fields}
    return LiveRun(folder, norm=norm, seed=seed, **given)


LIVE = {
    "state": "running",
    "train_loss": 0.12345,
    "test_accuracies": [0.1, 0.5, 0.9876],
    "times": [
        {"step": 0, "seconds": 0.0, "train_seconds": 0.0},
        {"step": 50, "seconds": 20.0, "train_seconds": 9.0},
    ],
}


def drawn(directory, runs, width, lines=None):
    """The lines for runs whose logs were written at this very moment."""
    for each in runs:
        each.timing.changed = 1000.0
    watched = Watched(Path(directory))
    watched.runs = runs
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None)
    console.print(view(watched, 1000.0, width, lines))
    found = stream.getvalue().splitlines()
    assert max(map(len, found)) <= width
    return [line.rstrip() for line in found]


def test_a_wide_terminal_shows_everything():
    # 50 of 200 steps in 20 seconds: 2.5 a second, and the other 150 take a minute.
    title, head, line = drawn("runs/x", [live(validation_accuracy=0.97, **LIVE)], width=120)
    assert title == "1 running in runs/x"
    assert head.split() == [
        *("run", "norm", "seed", "state", "step", "loss", "val.", "%", "test", "%"),
        *("test", "curve", "steps/s", "left"),
    ]
    cells = ["base", "batch_norm", "0", "━━━─────────", "25%", "50/200"]
    cells += ["0.123", "97.00", "98.76", "▁▄█", "2.5", "60", "s"]
    assert line.split() == cells


def test_a_narrow_terminal_shows_who_and_how_far():
    _, head, line = drawn("x", [live(validation_accuracy=0.97, **LIVE)], width=60)
    assert head.split() == ["run", "norm", "seed", "state", "test", "%", "left"]
    assert line == "base  batch_norm     0  ━━━─────────  25%   98.76  60 s"
    _, _, line = drawn("x", [live(setting="s" * 100, **LIVE)], width=60)
    assert line == "ssssssss…  batch_norm     0  ━━━─────────  25%   98.76  60 s"


def test_a_long_path_gives_way_to_the_counts():
    title, *_ = drawn("p" * 100, [live()], width=60)
    assert title == "1 done in " + "p" * 49 + "…"


def test_columns_that_say_nothing_are_left_out():
    _, head, _ = drawn("x", [live(setting="", seed=None, num_steps=None)], width=120)
    assert head.split() == ["norm", "state", "step"]


def test_running_ones_come_first_and_then_the_latest_to_end():
    runs = [
        live("a", state="planned"),
        live("b", status_written=10.0),
        live("c", **LIVE),
        live("d", state="failed", status_written=30.0),
        live("e", state="diverged", status_written=20.0),
    ]
    title, _, *rows = drawn("x", runs, width=100)
    assert title == "1 running, 1 planned, 1 done, 1 diverged, 1 failed in x"
    assert [row.split()[1] for row in rows] == ["c", "d", "e", "b"]


def test_a_terminal_of_few_lines_counts_the_rest():
    runs = [live(**LIVE), *(live(seed=seed, status_written=float(seed)) for seed in range(1000))]
    found = drawn("x", runs, width=100, lines=34)
    assert found[0] == "1 running, 1000 done in x"
    assert len(found) == 1 + 1 + 34 + 1
    assert found[-1] == "and 967 more that have begun"
    assert found[3].split()[:3] == ["base", "batch_norm", "999"]


def test_a_plan_that_nobody_works_on_is_said_to_be_so(tmp_path):
    planned = live(state="planned", folder=tmp_path)
    assert "Nobody works on the planned runs" in drawn("x", [planned], width=60)[-1]
    with run.locked(tmp_path):
        assert len(drawn("x", [planned], width=60)) == 1


def test_a_name_is_no_markup():
    found = drawn("[bold]x[/bold]", [live("[red]y[/red]")], width=120)
    assert found[0] == "1 done in [bold]x[/bold]"
    assert "[red]y[/red]" in found[2]


def test_curves():
    assert curve([]) == ""
    assert curve([0.5]) == curve([0.0]) == "▁"
    # Eighths of the range: 0, 3/7, 1.
    assert curve([0.1, 0.4, 0.8]) == "▁▄█"
    # Every eighth of 96 points, the last one among them.
    assert curve([0.0] * 95 + [1.0]) == "▁" * 11 + "█"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0.4, "0 s"),
        (89.0, "89 s"),
        (90.0, "2 min"),
        (5399.0, "90 min"),
        (5400, "1.5 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


# The command


def on_a_terminal(*arguments):
    """Starts the command on a terminal of 200 × 30; returns (process, the other end)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 200, 0, 0))
    # A width in the environment, as of a test runner, would come before the terminal's.
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
    process = subprocess.Popen(
        [*WATCH, *map(str, arguments)], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    return process, ours


def read_until(terminal, text, seconds=60.0):
    """Returns what the terminal got up to `text`, or all until the process closed it if None."""
    found, end = "", time.monotonic() + seconds
    while text is None or text not in found:
        assert time.monotonic() < end, found
        try:
            found += os.read(terminal, 65536).decode(errors="replace")
        except OSError:
            assert text is None, found
            break
    return found


def test_a_real_run_is_watched_to_its_end(tmp_path):
    folder = tmp_path / "run"
    train = [sys.executable, "-m", "normlab", "train", "--config=configs/digits.py"]
    train += [f"--workdir={folder}", "--config.train.num_steps=600", "--config.log.every_steps=50"]
    train += ["--config.model.widths=(8,)", "--config.model.strides=(2,)"]
    training = subprocess.Popen(train, stdout=subprocess.DEVNULL)
    while not (folder / "status.json").exists():
        assert training.poll() is None
        time.sleep(0.05)
    process, terminal = on_a_terminal(folder, "--every=0.1")
    shown = read_until(terminal, None)
    assert process.wait(10) == 0
    assert training.wait(60) == 0
    os.close(terminal)
    assert "1 running" in shown
    assert "━" in shown
    last = shown.replace("\r", "").rsplit("\x1b[2K", 1)[-1]
    assert "600/600" in last
    assert "done" in last
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")  # the cursor is back


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_at_once_with_the_cursor(number, tmp_path):
    (tmp_path / "sweep.json").write_text('{"runs": [{"id": "x", "labels": {"norm": "none"}}]}')
    process, terminal = on_a_terminal(tmp_path, "--every=60")
    read = read_until(terminal, "Nobody works")
    process.send_signal(number)
    began = time.monotonic()
    read += read_until(terminal, None)
    assert process.wait(10) == 128 + number
    assert time.monotonic() - began < 5.0
    assert read.rfind("\x1b[?25h") > read.rfind("\x1b[?25l")
    assert "Traceback" not in read
    os.close(terminal)


def test_without_a_terminal_or_asked_for_once_it_prints_once(tmp_path):
    (tmp_path / "sweep.json").write_text('{"runs": [{"id": "x", "labels": {"norm": "none"}}]}')
    wide = {**os.environ, "COLUMNS": "200"}
    ended = subprocess.run([*WATCH, tmp_path], capture_output=True, text=True, env=wide)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count("1 planned") == 1
    assert "\x1b" not in ended.stdout
    process, terminal = on_a_terminal(tmp_path, "--once")
    assert read_until(terminal, None).count("1 planned") == 1
    assert process.wait(10) == 0
    os.close(terminal)


def test_an_encoding_without_blocks_is_no_error(tmp_path):
    accuracies = "".join(f'{{"split": "test", "accuracy": 0.{n}}}\n' for n in range(9))
    (tmp_path / "metrics.jsonl").write_text(accuracies)
    (tmp_path / "identity.json").write_text("{}")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([*WATCH, tmp_path], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
