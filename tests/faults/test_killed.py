"""Processes that are killed: the same command ends with the bytes of a run that nobody touched.

tests/training/test_run.py has more of it: each event of a run, the last evaluation, exit codes.
"""

import random
import signal
from collections import Counter
from pathlib import Path

import pytest
from fault_tools import arguments, assert_same_run, small, start

from normlab import run
from normlab.training import checkpoint
from normlab.training.loop import train

LONG = {
    "train__num_steps": 400,
    "log__every_steps": 4,
    "eval__every_steps": 5,
    "checkpoint__every_steps": 5,
    "checkpoint__keep": 3,
}
PHASES = ("training", "evaluation", "checkpoint")


def killed(folder, journal, phase="none", number=0, part=0.0):
    """Starts the run and waits for its end, by itself or by the signal; returns its exit code."""
    script = Path(__file__).with_name("killed.py")
    words = [phase, number, part, journal, "--", *arguments(folder, **LONG)]
    process = start(words, script=script)
    _, errors = process.communicate(timeout=300)
    assert "Traceback" not in errors, errors
    return process.returncode


@pytest.mark.slow  # 22 processes: two to four minutes
def test_twenty_random_moments_leave_the_bytes_of_an_undisturbed_run(tmp_path):
    """Ten of SIGKILL and ten of SIGTERM, in each phase by turns; the moments from a fixed seed."""
    journal = tmp_path / "journal"
    assert killed(tmp_path / "whole", journal) == 0
    generator = random.Random(6)
    folder = tmp_path / "killed"
    for attempt in range(20):
        number = (signal.SIGKILL, signal.SIGTERM)[attempt % 2]
        code = killed(folder, journal, PHASES[attempt % 3], number.value, generator.random())
        # Killed by the signal, or saved and left with 128 + 15.
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 128 + signal.SIGTERM)
        assert not (folder / "result.json").exists()
    met = Counter(line.split()[0] for line in journal.read_text().splitlines())
    print(dict(met), f"after 20 signals at step {checkpoint.steps(folder / 'checkpoints')[-1]}")
    assert sum(met.values()) == 20
    # The thread may wake a little late, when a short phase is over; still each phase is met.
    assert set(PHASES) <= met.keys(), met
    assert killed(folder, journal) == 0
    config = small(**LONG)
    assert_same_run(folder, tmp_path / "whole", config)
    # Nothing half written is left, and no good checkpoint was set aside as a bad one.
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["390", "395", "400"]


def test_a_sigterm_while_a_checkpoint_is_written_saves_it_once(whole, tmp_path, monkeypatch):
    from normlab.training.signals import Interrupted

    save = checkpoint.save

    def interrupted(target, step, state, facts):
        if step == 8:
            signal.raise_signal(signal.SIGTERM)
        return save(target, step, state, facts)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", interrupted)
        with pytest.raises(Interrupted, match="stopped by SIGTERM at step 8"):
            train(small(), tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["4", "8"]  # and no bad-8-1
    assert run.read_status(tmp_path / "run") == "interrupted"
    train(small(), tmp_path / "run")
    assert_same_run(tmp_path / "run", whole, small())
