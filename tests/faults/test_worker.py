"""Workers of a sweep that the system kills: named in plain words, and the other runs go on."""

import contextlib
import os
import signal
from pathlib import Path

import pytest
from fault_tools import start

from normlab import grid, pool, report, run, sweep

KILLED = "was killed (SIGKILL), perhaps by the out-of-memory killer"
TINY = {
    "model.widths": "(4,)",
    "model.strides": "(2,)",
    "train.num_steps": "4",
}
GREEDY = """
import sys
from pathlib import Path
from configs import digits

def get_config(argument=""):
    if Path(sys.argv[0]).name == "worker.py" and "norm=none" in argument:
        from normlab.training import loop
        load = loop.load_data
        def greedy(*arguments):
            {act}
            return load(*arguments)
        loop.load_data = greedy
    return digits.get_config(argument)
"""


def test_the_words_for_how_a_process_ended():
    assert pool._ending(-signal.SIGKILL) == KILLED
    assert pool._ending(-signal.SIGSEGV) == "was ended by SIGSEGV"
    assert pool._ending(-40) == "was ended by signal 40"
    assert pool._ending(3) == "ended with exit code 3"


def test_a_worker_killed_at_each_attempt_is_named_in_the_report_and_the_others_go_on(tmp_path):
    source = tmp_path / "greedy.py"
    source.write_text(GREEDY.format(act="import os; os.kill(os.getpid(), 9)"))
    varied = grid.grid({"norm": ["none", "layer_norm"]})
    plan = sweep.make_plan(str(source), varied, seeds=[0], overrides=TINY)
    folder = tmp_path / "sweep"
    folder.mkdir()
    sweep.write_plan(plan, folder)
    states = pool.run_plan(plan, folder, 1, 1, lambda event: None)
    victim, other = (planned.id for planned in plan.runs)
    assert states == {victim: "failed", other: "done"}
    assert run.read_json(folder / victim / "status.json")["message"] == f"its process {KILLED}"
    paths = report.write(folder)
    for path in (paths.html, paths.markdown):
        assert f"its process {KILLED}" in path.read_text()


MEMORY = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"  # version 1 of control groups
UNIFIED = Path("/sys/fs/cgroup"), "memory.max"


@pytest.fixture
def small_memory():
    """A control group of 1.5 GB without swap: a folder whose `cgroup.procs` takes processes."""
    root, limit = MEMORY if (MEMORY[0] / MEMORY[1]).exists() else UNIFIED
    folder = root / f"normlab-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / limit).write_text(str(3 * 2**29))
        for name in ("memory.swap.max", "memory.memsw.limit_in_bytes"):
            with contextlib.suppress(OSError):
                (folder / name).write_text("0" if "max" in name else str(3 * 2**29))
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        pytest.skip(f"no control group with a limit of memory can be made here: {error}")
    yield folder
    folder.rmdir()


@pytest.mark.slow  # a sweep with two worker processes
def test_a_worker_killed_by_the_out_of_memory_killer(tmp_path, small_memory):
    source = tmp_path / "greedy.py"
    source.write_text(
        GREEDY.format(act="hoard = bytearray(8 * 2**30); hoard[::4096] = b'x' * 2**21")
    )
    words = ["compare", source, "--norms=none,layer_norm", "--seeds=1", "--jobs=1"]
    words += [f"--workdir={tmp_path / 'sweep'}"]
    words += [f"--config.{name}={value}" for name, value in TINY.items()]
    # A shell goes into the group and becomes the command, so the rest of the machine is safe.
    enter = f'echo $$ > {small_memory}/cgroup.procs && exec "$@"'
    process = start([*words], entered_by=["/bin/sh", "-c", enter, "sh"])
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" not in errors
    plan = run.read_json(tmp_path / "sweep" / "sweep.json")
    ids = {entry["labels"]["norm"]: entry["id"] for entry in plan["runs"]}
    assert f"none · seed 0: its process {KILLED}" in output
    assert f"run {ids['none']} failed" in errors
    assert run.read_status(tmp_path / "sweep" / ids["layer_norm"]) == "done"
    assert KILLED in (tmp_path / "sweep" / "report.md").read_text()
