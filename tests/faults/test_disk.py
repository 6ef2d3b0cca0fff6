"""Disks that are full, or cannot be written, while a run logs, checkpoints and is reported on.

The disks are real: file systems in memory, mounted by the test.
"""

import subprocess
import sys

import pytest
from fault_tools import arguments, assert_same_run, command, small

from normlab import report, run
from normlab.cli import main
from normlab.training import checkpoint, loop
from normlab.training.loop import train

CHATTY = {"train__num_steps": 100, "log__every_steps": 1, "checkpoint__every_steps": 50}
"""Fifteen kilobytes of metrics: a full disk refuses them at the next page, of 4,096 bytes."""


def at_line(monkeypatch, number, act):
    """Has `act` called before the line of that number is logged, once."""
    log, seen = loop._Run._log, []

    def acting(self, line):
        seen.append(line)
        if len(seen) == number:
            act()
        log(self, line)

    monkeypatch.setattr(loop._Run, "_log", acting)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chatty") / "run"
    train(small(**CHATTY), folder)
    return folder


def test_a_disk_full_while_logging_costs_a_line_of_words_and_no_byte(
    disk, chatty, monkeypatch, capsys
):
    folder = disk.path / "run"
    with monkeypatch.context() as patch:
        at_line(patch, 60, disk.fill)
        code, errors = command(arguments(folder, **CHATTY), capsys)
    assert code == 1
    assert errors[-1] == "normlab: no space left on device"
    # Beside it at most the sink's word that it stops; no traceback.
    assert all(line.startswith("normlab: ") for line in errors)
    assert not (folder / "result.json").exists()
    assert run.read_status(folder) in ("failed", "interrupted")
    disk.make_room()
    assert main(arguments(folder, **CHATTY)) == 0
    assert "resumed at step 50" in (folder / "log.txt").read_text()
    assert_same_run(folder, chatty, small(**CHATTY))


@pytest.mark.parametrize("spare", [0, 16_384], ids=["seen before", "amid the writing"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's loop
def test_a_disk_full_while_checkpointing_costs_the_steps_since_the_one_before(
    disk, whole, monkeypatch, capsys, spare
):
    """Room is asked for before; without that (`_OVERHEAD_BYTES`) orbax meets the end itself."""
    folder = disk.path / "run"
    save = checkpoint.save

    def filling(target, step, state, facts):
        if step == 8:
            disk.fill(spare)
        return save(target, step, state, facts)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", filling)
        if spare:
            patch.setattr(checkpoint, "_OVERHEAD_BYTES", -(2**30))
        code, errors = command(arguments(folder), capsys)
    assert code == 1
    expected = f"normlab: no space left on device for a checkpoint in {folder / 'checkpoints'}"
    assert errors == [expected]
    # What was begun is gone: it would stand in the way of the room that is to be made.
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["4"]
    disk.make_room()
    assert main(arguments(folder)) == 0
    assert_same_run(folder, whole, small())


def test_a_disk_full_while_reporting_keeps_the_older_report(disk, whole, capsys):
    folder = disk.path / "run"
    subprocess.run(["cp", "-r", whole, folder], check=True)
    paths = report.write(folder)
    files = [*paths[1:], *paths.figures.iterdir()]
    older = {path: path.read_bytes() for path in files}
    run.append_line(folder / "metrics.jsonl", {"step": 12, "split": "test", "accuracy": 0.5})
    disk.fill()
    code, errors = command(["report", str(folder)], capsys)
    assert code == 1
    assert len(errors) == 1
    assert errors[0].endswith("cannot be written: No space left on device")
    assert {path: path.read_bytes() for path in files} == older
    disk.make_room()
    assert main(["report", str(folder)]) == 0
    assert paths.html.read_bytes() != older[paths.html]


def test_a_disk_that_is_full_from_the_start_is_the_machines_fault(disk, capsys):
    disk.fill()
    code, errors = command(arguments(disk.path / "run"), capsys)
    assert (code, len(errors)) == (1, 1)
    assert "no space left on device" in errors[0].lower()


def test_output_to_a_full_disk_is_one_line(whole):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "normlab", "status", str(whole)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (1, "normlab: no space left on device\n")


@pytest.mark.parametrize("what", ["metrics.jsonl", "checkpoints"])
def test_a_folder_made_read_only_amid_a_run_costs_the_steps_since_the_last_checkpoint(
    disk, whole, monkeypatch, capsys, what
):
    folder = disk.path / "run"
    save = checkpoint.save

    def protecting(target, step, state, facts):
        if step == 8:
            disk.protect(folder)
        return save(target, step, state, facts)

    with monkeypatch.context() as patch:
        if what == "checkpoints":
            patch.setattr(checkpoint, "save", protecting)
        else:
            at_line(patch, 3, lambda: disk.protect(folder))
        code, errors = command(arguments(folder), capsys)
    assert (code, len(errors)) == (1, 1)
    assert "read-only file system" in errors[0].lower()
    assert str(folder / what) in errors[0]
    disk.release(folder)
    assert main(arguments(folder)) == 0
    assert_same_run(folder, whole, small())


def test_a_read_only_folder_is_refused_and_can_be_read(disk, whole, capsys):
    folder = disk.path / "run"
    subprocess.run(["cp", "-r", whole, folder], check=True)
    (folder / "result.json").unlink()
    disk.protect(folder)
    code, errors = command(arguments(folder), capsys)
    assert code == 2
    assert errors == [f"normlab: workdir '{folder}' cannot be written: Read-only file system"]
    assert command(["status", str(folder)], capsys) == (0, [])
    assert command(["eval", str(folder)], capsys) == (0, [])
    assert command(["watch", "--once", str(folder)], capsys) == (0, [])
    code, errors = command(["report", str(folder)], capsys)
    assert code == 1
    assert errors == [f"normlab: '{folder / 'figures'}' cannot be written: Read-only file system"]
    disk.release(folder)
