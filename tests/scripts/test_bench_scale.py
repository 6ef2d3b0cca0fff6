"""`scripts/bench_scale.py` at a tiny size: each part prints a table of what it has measured."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TINY_NET = "--config=configs/digits.py:model=mlp"


def bench(*arguments):
    """Returns the heading and the rows of a table, as lists of cells."""
    command = [sys.executable, "scripts/bench_scale.py", *arguments, "--markdown"]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = ended.stdout.splitlines()
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    return lines[0], [table[0], *table[2:]]


def test_communication_is_a_row_a_normalizer():
    heading, (columns, *rows) = bench(
        "communication", TINY_NET, "--devices=8", "--norms=batch_norm,group_norm"
    )
    assert "on 8 devices" in heading
    assert columns[-1] == "ms, NVLink 4, 8 GPUs"
    assert [row[0] for row in rows] == ["batch_norm", "group_norm"]
    assert rows[1][1:4] == ["0 + 0", "0.0", "0.0"]


@pytest.mark.slow
def test_a_report_is_made_of_fabricated_runs_and_its_memory_is_told(tmp_path):
    size = ["--runs=3", "--lines=6", "--rounds=1", f"--workdir={tmp_path}"]
    heading, (_, [number, seconds, processor, peak]) = bench("report", *size)
    assert "3 runs × 6 lines" in heading
    assert number == "1"
    assert float(seconds) > 0
    assert float(processor) > 0
    assert float(peak) > 10  # MiB: no Python needs less
    folders = [path.parent for path in tmp_path.glob("3x6/*/result.json")]
    assert len(folders) == 3
    for folder in folders:
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 6
    assert "100" in (tmp_path / "3x6" / "report.md").read_text()  # planned are 100


@pytest.mark.slow
def test_a_sweep_is_charged_what_its_runs_did_not_take():
    heading, (columns, *rows) = bench("sweep", "--runs=2", "--jobs=1")
    assert "1 workers" in heading
    [[runs, seconds, _, own, compiling, overhead, _]] = rows
    assert columns[0] == "runs"
    assert runs == "2"
    whole = (float(seconds) - 2 * float(own) - 2 * float(compiling)) / 2
    assert float(overhead) == pytest.approx(whole, abs=0.06)  # seconds have one digit


@pytest.mark.slow
def test_start_up_is_divided_into_stages_that_add_up():
    _, (_, *rows) = bench("startup", TINY_NET, "--rounds=1")
    stages = {name: (float(cold), float(warm)) for name, cold, warm in rows}
    assert {"import", "data", "build", "trace and compile", "first step"} < stages.keys()
    for kind in (0, 1):
        total = stages["total"][kind]
        parts = sum(times[kind] for name, times in stages.items() if name != "total")
        assert parts == pytest.approx(total, abs=0.06)


@pytest.mark.slow
def test_devices_are_compared_with_one_device():
    size = ["--counts=1,2", "--rounds=1", "--batch-size=8"]
    _, (_, *rows) = bench("devices", TINY_NET, *size)
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        assert float(row[4]) > 0
        if row[1] == "1" and row[3] == "jit":
            assert row[5] == "1.00"
