"""The launcher on a real SLURM of one node, which scripts/slurm_test_cluster.sh starts.

`pytest -m slurm`, as root, where slurm-wlm, munge and submitit are installed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from normlab import grid, pool, sweep
from normlab.launchers.slurm import queue

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "slurm_test_cluster.sh"
SMALL = {
    "model.widths": "(4,)",
    "model.strides": "(2,)",
    "train.num_steps": "20",
    "log.every_steps": "5",
    "eval.every_steps": "10",
    # Nothing is saved before the end but at a signal.
    "checkpoint.every_steps": "1000000",
}
LONG = SMALL | {"train.num_steps": "16000", "log.every_steps": "50", "eval.every_steps": "8000"}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    pytest.importorskip("submitit", reason="submitit is not installed (requirements-dev.txt)")
    if os.getuid() != 0:
        pytest.skip("a SLURM to test with is started by root alone")
    for daemon in ("munged", "slurmctld", "slurmd"):
        if shutil.which(daemon, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            pytest.skip(f"no {daemon} here: {SCRIPT.name} install")
    folder = Path(tempfile.mkdtemp(prefix="normlab-slurm-"))  # munge wants all its parents open
    started = subprocess.run([SCRIPT, "start", folder], capture_output=True, text=True, check=False)
    if started.returncode:
        subprocess.run([SCRIPT, "stop", folder], check=False)
        pytest.skip(f"SLURM does not start here: {started.stderr.strip()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield
        subprocess.run([SCRIPT, "stop", folder], check=True)
    shutil.rmtree(folder)


class Typed:
    """`normlab compare --launcher=slurm`, typed."""

    def __init__(self, folder, norms, fields, options="poll=0.5", seeds=1):
        self.folder = folder
        command = [sys.executable, "-m", "normlab", "compare", "configs/digits.py"]
        command += [f"--norms={','.join(norms)}", f"--seeds={seeds}", f"--workdir={folder}"]
        command += [f"--launcher=slurm:{options}"]
        command += [f"--config.{name}={value}" for name, value in fields.items()]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ended(self):
        """Returns (exit code, stdout, stderr)."""
        out, err = self.process.communicate(timeout=400)
        return self.process.returncode, out, err


def local(folder, norms, fields, seeds=1):
    """Runs the same on this machine; returns the plan."""
    varied = grid.settings({"base": {}}) * grid.grid({"norm": norms})
    plan = sweep.make_plan("configs/digits.py", varied, seeds=range(seeds), overrides=fields)
    folder.mkdir()
    sweep.write_plan(plan, folder)
    pool.run_plan(plan, folder, 2, 1, lambda event: None)
    return plan


def metrics(folder):
    """Returns {run id: bytes of its metrics} of a sweep's folder."""
    ids = {entry["id"] for entry in json.loads((folder / "sweep.json").read_text())["runs"]}
    return {run_id: (folder / run_id / "metrics.jsonl").read_bytes() for run_id in ids}


def arrays(folder):
    """Returns the run ids of each array that was submitted, as a set of tuples."""
    paths = (folder / "slurm").glob("*/tasks.json")
    found = [[task["id"] for task in json.loads(path.read_text())["tasks"]] for path in paths]
    return {tuple(ids) for ids in found}


def jobs(folder):
    """Returns {run id: number of its job} of what is in the queue."""
    found = {}
    for path in (folder / "slurm").glob("*/tasks.json"):
        ids = [task["id"] for task in json.loads(path.read_text())["tasks"]]
        command = ["squeue", "--noheader", "--array", "--format=%i", f"--name={path.parent.name}"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for number in shown.split():
            found[ids[int(number.partition("_")[2] or 0)]] = number
    return found


def until(condition, seconds=120):
    """Waits until the condition is something; returns what it is."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.2)
    return found


def trains(folder, run_id):
    """True once a run has written a line of training."""
    path = folder / run_id / "metrics.jsonl"
    return path.exists() and b'"train"' in path.read_bytes()


def log(folder, run_id):
    return (folder / run_id / "log.txt").read_text()


def go_at_once(*numbers, check=True):
    """Spares requeued jobs SLURM's two minutes of waiting."""
    time.sleep(4)  # SLURM forgets what it is told sooner
    for number in numbers:
        subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now"], check=check)


def test_an_array_gives_the_bytes_of_this_machine_and_is_not_submitted_again(tmp_path):
    norms, there, here = ("none", "batch_norm"), tmp_path / "there", tmp_path / "here"
    code, out, err = Typed(there, norms, SMALL, seeds=2).ended()
    assert code == 0, err
    assert "submitted 4 runs as SLURM's job" in err
    assert "2 normalizers in 1 setting, 2 seeds each: 4 runs, all done" in out
    plan = local(here, norms, SMALL, seeds=2)
    assert arrays(there) == {tuple(planned.id for planned in plan.runs)}
    assert metrics(there) == metrics(here)
    code, out, err = Typed(there, norms, SMALL, seeds=2).ended()
    assert (code, "submitted" in err) == (0, False)


def test_a_run_whose_time_is_up_and_one_that_is_preempted_end_with_the_same_bytes(tmp_path):
    """Two jobs of one array: a signal as before the time limit, and `scontrol requeue`."""
    norms, there, here = ("none", "batch_norm"), tmp_path / "there", tmp_path / "here"
    typed = Typed(there, norms, LONG)
    numbers = until(lambda: len(found := jobs(there)) == 2 and found)
    first, last = (entry["id"] for entry in json.loads((there / "sweep.json").read_text())["runs"])
    until(lambda: trains(there, first) and trains(there, last))
    # The last job of an array has the array's number: it must not requeue the first one with it.
    subprocess.run(["scancel", "--signal=USR2", numbers[last]], check=True)
    until(lambda: queue(there).get(last) == "PENDING")
    assert queue(there)[first] == "RUNNING"
    subprocess.run(["scontrol", "requeue", numbers[first]], check=True)
    until(lambda: queue(there).get(first) == "PENDING")
    go_at_once(*numbers.values())
    code, out, err = typed.ended()
    assert code == 0, err
    assert "2 runs, all done" in out
    assert len(arrays(there)) == 1
    for run_id in (first, last):
        assert log(there, run_id).count("resumed at step") == 1
    local(here, norms, LONG)
    assert metrics(there) == metrics(here)


@pytest.mark.slow
def test_a_run_longer_than_its_jobs_time_takes_several_turns(tmp_path):
    """The time limit itself. SLURM gives warning up to a minute before it is asked to."""
    there, here = tmp_path / "there", tmp_path / "here"
    fields = LONG | {"train.num_steps": "300000", "eval.every_steps": "300000"}  # minutes
    typed = Typed(there, ("none",), fields, options="poll=0.5,time=2,grace=60")
    [run_id] = until(lambda: list(jobs(there)))
    while typed.process.poll() is None:
        if queue(there).get(run_id) == "PENDING":
            go_at_once(*jobs(there).values(), check=False)  # at first it starts by itself
        time.sleep(0.5)
    code, _, err = typed.ended()
    assert code == 0, err
    assert "resumed at step" in log(there, run_id)
    local(here, ("none",), fields)
    assert metrics(there) == metrics(here)


def test_a_sweep_whose_process_is_killed_is_not_submitted_twice(tmp_path):
    first = Typed(tmp_path, ("none", "batch_norm"), LONG)
    before = until(lambda: len(found := jobs(tmp_path)) == 2 and found)
    first.process.kill()
    first.ended()
    assert jobs(tmp_path) == before
    # More seeds: the new runs are submitted, and the old ones waited for.
    again = Typed(tmp_path, ("none", "batch_norm"), LONG, seeds=2)
    after = until(lambda: len(found := jobs(tmp_path)) == 4 and found)
    assert before.items() <= after.items()
    code, out, err = again.ended()
    assert code == 0, err
    assert "2 runs are in the queue already" in err
    assert "4 runs, all done" in out
    planned = [entry["id"] for entry in json.loads((tmp_path / "sweep.json").read_text())["runs"]]
    assert sorted(map(sorted, arrays(tmp_path))) == sorted(
        [sorted(before), sorted({*planned} - {*before})]
    )


@pytest.mark.slow
def test_ctrl_c_leaves_the_jobs_and_a_cancelled_one_goes_on_when_asked(tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    typed = Typed(there, ("none",), LONG)
    [(run_id, number)] = until(lambda: list(jobs(there).items()))
    until(lambda: trains(there, run_id))
    typed.process.send_signal(signal.SIGINT)
    code, _, err = typed.ended()
    assert code == 130
    [name] = [path.name for path in (there / "slurm").iterdir()]
    assert f"'scancel --name={name}' ends them" in err
    assert queue(there) == {run_id: "RUNNING"}
    typed = Typed(there, ("none",), LONG)
    time.sleep(5)
    subprocess.run(["scancel", number], check=True)
    code, _, err = typed.ended()
    assert code == 1
    assert f"run {run_id} interrupted" in err
    code, _, err = Typed(there, ("none",), LONG).ended()  # it is not requeued, but asked for again
    assert code == 0, err
    assert log(there, run_id).count("resumed at step") == 1
    local(here, ("none",), LONG)
    assert metrics(there) == metrics(here)


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path):
    plan = sweep.make_plan(
        "configs/digits.py",
        grid.settings({"base": {}}) * grid.grid({"norm": ("none", "batch_norm")}),
        seeds=[0],
        overrides=SMALL,
    )
    bad, good = (planned.id for planned in plan.runs)
    sweep.write_plan(plan, tmp_path)
    (tmp_path / bad).mkdir()
    (tmp_path / bad / "stranger").write_text("in the way")
    code, out, err = Typed(tmp_path, ("none", "batch_norm"), SMALL).ended()
    assert code == 1
    assert f"run {bad} failed" in err
    assert good not in err
    assert "its job ended without a word (see " in out  # the folder is not the run's to write
    [path] = (tmp_path / "slurm").glob("*/*_0_0_log.out")
    assert "is not a run folder and holds 'stranger'" in path.read_text()
    (tmp_path / bad / "stranger").unlink()
    code, _, err = Typed(tmp_path, ("none", "batch_norm"), SMALL).ended()
    assert code == 0, err
    assert "submitted 1 run as SLURM's job" in err


def template(folder, tasks, fields):
    """Submits scripts/templates/slurm_train.sbatch; returns the number of the job."""
    command = ["sbatch", "--parsable", "--nodes=1", f"--ntasks-per-node={tasks}"]
    command += ["--cpus-per-task=1", "--gpus-per-node=0", f"--output={folder}.log"]
    command += ["scripts/templates/slurm_train.sbatch", f"--workdir={folder}"]
    command += ["--config=configs/digits.py:norm=batch_norm"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    environment = os.environ | {"PYTHON": sys.executable, "NPROC": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return ended.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [1, 2])
def test_the_template_of_a_long_run_saves_and_requeues_itself(tmp_path, tasks):
    """All processes get a signal as before the time limit; they go on together."""
    if tasks > 1:
        shown = [sys.executable, "-m", "normlab", "train", "--help"]
        if "--distributed" not in subprocess.run(shown, capture_output=True, text=True).stdout:
            pytest.skip("this normlab has no --distributed")
    fields = LONG if tasks == 1 else LONG | {"train.num_steps": "600"}
    number = template(tmp_path / "cut", tasks, fields)
    until(lambda: trains(tmp_path, "cut"))
    subprocess.run(["scancel", "--signal=USR1", number], check=True)
    pending = ["squeue", "--noheader", "--format=%i", "--states=PENDING"]
    until(lambda: number in subprocess.check_output(pending, text=True).split())
    assert f"requeueing job {number}" in (tmp_path / "cut.log").read_text()
    go_at_once(number)
    until(lambda: (tmp_path / "cut" / "result.json").exists())
    assert log(tmp_path, "cut").count("resumed at step") == 1
    template(tmp_path / "whole", tasks, fields)
    until(lambda: (tmp_path / "whole" / "result.json").exists())
    cut, whole = (tmp_path / name / "metrics.jsonl" for name in ("cut", "whole"))
    assert cut.read_bytes() == whole.read_bytes()
