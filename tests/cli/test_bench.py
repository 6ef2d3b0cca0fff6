"""`normlab bench norms`: a table a shape, and one line for a mistake."""

import importlib.util
import json

import pytest

from normlab.cli import main

TINY = ["bench", "norms", "--shapes=4x4x4x8", "--rounds=1", "--norms=batch_norm,dyt"]


def test_a_row_for_the_copy_and_each_normalizer(capsys, tmp_path):
    assert main([*TINY, f"--json={tmp_path / 'figures.json'}"]) == 0
    machine, _, heading, columns, *rows = capsys.readouterr().out.splitlines()
    assert "jax" in machine
    assert heading == "4x4x4x8, 4×4×4×8 float32"
    assert columns.startswith("normalizer")
    assert [row.split()[0] for row in rows] == ["copy", "batch_norm", "dyt"]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["rows"][1]["both"]["bytes"] == 8 * 4 * 4 * 4 * 8 * 4
    assert figures["machine"]["threads"] >= 1


def test_markdown_is_for_a_page_and_bfloat16_moves_half(capsys, tmp_path):
    options = ["--markdown", "--dtype=bfloat16", "--clock=cpu"]
    assert main([*TINY, *options, f"--json={tmp_path / 'f.json'}"]) == 0
    out = capsys.readouterr().out
    assert "### 4x4x4x8, 4×4×4×8 bfloat16" in out
    assert "| batch_norm | " in out
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["rows"][1]["both"]["bytes"] == 8 * 4 * 4 * 4 * 8 * 2


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("--norms=bach_norm", "unknown norm 'bach_norm'; did you mean 'batch_norm'?"),
        ("--shapes=cifar_earl", "unknown shape 'cifar_earl'; did you mean 'cifar_early'?"),
        ("--dtype=float3", "unknown dtype 'float3'; did you mean 'float32'?"),
        ("--against=pytorch", "unknown contender 'pytorch'; did you mean 'torch'?"),
        ("--clock=wal", "unknown clock 'wal'; did you mean 'wall'?"),
        ("--rounds=0", "--rounds=0 must be 1 or more"),
    ],
)
def test_a_mistake_is_one_line(capsys, argument, line):
    assert main([*TINY, argument]) == 2
    assert capsys.readouterr().err == f"normlab: {line}\n"


def test_figures_overwrite_nothing_and_need_a_folder_that_is_there(capsys, tmp_path):
    (tmp_path / "figures.json").write_text("mine")
    for name, reason in (
        ("figures.json", "exists; name another file"),
        ("a/b.json", f"there is no folder '{tmp_path / 'a'}'"),
    ):
        assert main([*TINY, f"--json={tmp_path / name}"]) == 2
        assert reason in capsys.readouterr().err
    assert (tmp_path / "figures.json").read_text() == "mine"


def test_what_is_timed_must_be_known(capsys):
    assert main(["bench", "norm"]) == 2
    assert "unknown benchmark 'norm'; did you mean 'norms'?" in capsys.readouterr().err


def test_pytorch_is_timed_beside_it_or_said_to_be_absent(capsys):
    code = main([*TINY, "--against=torch"])
    out, err = capsys.readouterr()
    if importlib.util.find_spec("torch") is None:
        assert code == 2
        assert err == "normlab: --against=torch needs PyTorch: pip install torch\n"
    else:
        assert code == 0
        assert "× PyTorch" in out
