"""`normlab report DIR` as a user runs it."""

import argparse
import subprocess
import sys
import time

import pytest

from normlab.cli import report as command
from normlab.errors import UserError

# The command in a process of its own, which then tells what it imported.
_RUN = """
import argparse, sys
from normlab.cli import report
parser = argparse.ArgumentParser()
report.add_arguments(parser)
code = report.main(parser.parse_args())
heavy = {"jax", "jaxlib", "flax", "scipy.stats", "matplotlib.pyplot", "pandas"}
print("imported:", *sorted(heavy & sys.modules.keys()), file=sys.stderr)
sys.exit(code)
"""


def _main(directory) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.main(parser.parse_args([str(directory)]))


def test_prints_the_table_and_the_paths(make_sweep, tmp_path, capsys):
    assert _main(make_sweep(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 normalizers in 3 settings, 3 seeds each: 42 runs, all done."
    assert lines[1].split() == ["normalizer", "base", "lr", "x5", "ghost", "1"]
    reports = [str(tmp_path / f"report.{suffix}") for suffix in ("tex", "html", "md", "csv")]
    assert lines[-5:] == [f"{tmp_path / 'figures'}/", *reports]


def test_a_run_whose_process_was_killed_is_interrupted(make_sweep, tmp_path, capsys):
    """As `normlab status` says: status.json has its last word, and nobody holds the lock."""
    make_sweep(tmp_path, seeds=(0,), run=lambda *what: {"state": "running"})
    assert _main(tmp_path) == 0
    assert "14 interrupted" in capsys.readouterr().out
    assert "running" not in (tmp_path / "report.csv").read_text()


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError) as caught:
        _main(tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_42_runs_in_a_fresh_process_without_jax(make_sweep, tmp_path):
    make_sweep(tmp_path)
    start = time.perf_counter()
    arguments = [sys.executable, "-c", _RUN, str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    assert done.stderr.strip() == "imported:"
    assert seconds < 15  # 2.5 s on two idle cores, most of it 18 figures as files


def test_the_command_module_imports_nothing_heavy():
    code = (
        "import sys, normlab.cli.report;"
        "print(*sorted({'numpy', 'matplotlib', 'jax', 'rich', 'scipy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
