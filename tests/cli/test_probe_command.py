"""`normlab probe`: a table, files in a new folder, and one line for a mistake."""

import json
from pathlib import Path

import pytest

from normlab.analysis import signals
from normlab.cli import main
from normlab.errors import UserError
from normlab.report.profiles import Profile

CONFIG = "--config=configs/digits.py:model=mlp"
SMALL = ["--config.model.widths=(8,6)", "--config.train.batch_size=16", "--seeds=2"]


@pytest.mark.parametrize("what", ["signals", "gradients"])
def test_a_probe_prints_a_table_and_writes_four_files(what, capsys, tmp_path):
    folder = tmp_path / "new" / "probe"
    assert main(["probe", what, CONFIG, *SMALL, f"--workdir={folder}"]) == 0
    out = capsys.readouterr().out
    assert "model mlp, norm batch_norm" in out
    assert ("dense2" if what == "signals" else "norm2") in out
    assert {path.name for path in folder.iterdir()} == {
        f"{what}.{suffix}" for suffix in ("json", "csv", "svg", "pdf")
    }
    found = json.loads((folder / f"{what}.json").read_text())
    assert found["seeds"] == [0, 1]
    assert found["subject"]["input"] == "gaussian"
    assert str(tmp_path) not in (folder / f"{what}.json").read_text()

    again = tmp_path / "again"
    assert main(["probe", what, CONFIG, *SMALL, f"--workdir={again}"]) == 0
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_without_a_workdir_nothing_is_written(capsys, tmp_path, monkeypatch):
    config = f"--config={Path('configs/digits.py').resolve()}:model=mlp"
    monkeypatch.chdir(tmp_path)
    assert main(["probe", "signals", config, *SMALL]) == 0
    assert not list(tmp_path.iterdir())
    assert ".svg" not in capsys.readouterr().out


def test_the_folder_is_made_before_measuring_and_taken_away_if_that_fails(
    capsys, tmp_path, monkeypatch
):
    folder = tmp_path / "new" / "probe"
    found = []

    def fail(subject, **how):
        found.append(folder.is_dir())
        raise UserError("no such measurement")

    monkeypatch.setattr(signals, "measure_signals", fail)
    assert main(["probe", "signals", CONFIG, *SMALL, f"--workdir={folder}"]) == 2
    assert found == [True]
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    assert main(["probe", "signals", CONFIG, *SMALL, f"--workdir={tmp_path}/file/x"]) == 2
    assert found == [True]  # refused before anything is measured
    assert "cannot be written: Not a directory" in capsys.readouterr().err


def test_what_is_not_finite_is_said_in_one_line(capsys, monkeypatch):
    found = Profile(
        probe="signals",
        title="",
        subject={"model": "some_net"},
        places=("first", "second"),
        seeds=(0,),
        values={"variance": [[1.0, float("inf")]]},
        summary={"not finite": "from second on", "growth": None, "ratio": 2.0},
    )
    monkeypatch.setattr(signals, "measure_signals", lambda subject, **how: found)
    assert main(["probe", "signals", CONFIG, *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == ["not finite: from second on", "growth: –", "ratio: 2"]
    assert lines[-4].split() == ["second", "inf"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["signal", CONFIG], "unknown probe 'signal'; did you mean 'signals'?"),
        (["signals"], "a probe takes either --config=FILE.py[:choices] or --run=RUN"),
        (["signals", CONFIG, "--run=x"], "a probe takes either --config="),
        (["signals", CONFIG, "--step=3"], "--step is of a run's checkpoint; give it with --run"),
        (["signals", "--run=x", "--config.seed=1"], "--config.seed has no place beside --run"),
        (["signals", "--run=nowhere"], "'nowhere' is not a run folder: it has no config.json"),
        (["signals", CONFIG, "--seeds=0"], "--seeds=0 must be 1 or more"),
        (["signals", CONFIG, "--input=gauss"], "unknown input 'gauss'; did you mean 'gaussian'?"),
        (["signals", CONFIG, "--by=block"], "unknown kind of place 'block'; did you mean 'blocks'"),
        (["signals", CONFIG, "--by=blocks"], "model 'mlp' has no residual blocks; go by layers"),
        (["signals", CONFIG, "--statistics=b"], "unknown kind of statistics 'b'"),
        (["signals", CONFIG, "--objective=loss"], "--objective is of the probe 'gradients'"),
        (["gradients", CONFIG, "--objective=los"], "unknown objective 'los'; did you mean 'loss'?"),
        (["signals", CONFIG, "--workdir=tests"], "workdir 'tests' exists; choose a new folder"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, line):
    assert main(["probe", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"normlab: {line}")
    assert error.count("\n") == 1
