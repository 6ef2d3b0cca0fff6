"""Two processes on one folder: the second is refused, by a lock that dies with its holder."""

import json
import signal
import subprocess
import sys
import time

import pytest
from fault_tools import arguments, assert_same_run, command, small, start

from normlab import run
from normlab.cli import main

HOLD = (
    "import sys; from pathlib import Path; from normlab import run\n"
    "with run.locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def holder(own):
    """A process that holds the folder of an unfinished run."""
    (own / "result.json").unlink()
    words = [sys.executable, "-c", HOLD, str(own)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_refused_and_touches_nothing(own, holder, capsys):
    before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}
    code, errors = command(arguments(own), capsys)
    assert code == 2
    assert errors == [f"normlab: '{own}' is being written by another process"]
    assert {path: path.read_bytes() for path in own.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_dies_with_its_holder(own, whole, holder, number):
    assert run.is_locked(own)
    holder.send_signal(number)
    holder.wait(10)
    assert not run.is_locked(own)
    assert (own / "lock").exists()  # the file stays: it is not what holds
    assert main(arguments(own)) == 0
    assert_same_run(own, whole, small())


@pytest.mark.slow  # two processes that train
def test_two_trainings_at_once_are_one(tmp_path):
    folder = tmp_path / "run"
    words = arguments(folder, train__num_steps=100_000)
    first = start(words)
    try:
        first.stdout.readline()  # what it is
        first.stdout.readline()  # a line of metrics: it trains
        second = start(words)
        _, errors = second.communicate(timeout=120)
        assert second.returncode == 2
        assert errors == f"normlab: '{folder}' is being written by another process\n"
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    third = start(words)
    third.stdout.readline()
    time.sleep(0.5)
    third.terminate()
    _, errors = third.communicate(timeout=60)
    assert third.returncode == 143, errors
    assert json.loads((folder / "status.json").read_text())["status"] == "interrupted"
