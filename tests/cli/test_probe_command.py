"""`normlab probe`: a table, files in a new folder, and one line for a mistake."""

import json

import pytest

from normlab.cli import main

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
    before = sorted(tmp_path.iterdir())
    assert main(["probe", "signals", CONFIG, *SMALL]) == 0
    assert sorted(tmp_path.iterdir()) == before
    assert ".svg" not in capsys.readouterr().out


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
