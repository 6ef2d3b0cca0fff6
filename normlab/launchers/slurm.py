"""SLURM: an array of jobs, one run each, submitted by submitit (MIT licence).

A run that is told that its time is up (SIGUSR1 or SIGUSR2, by `--signal` of the job) saves and puts
its job back into the queue; told to end (SIGTERM: preemption, scancel), it saves and leaves, and
SLURM itself puts back what it preempted. Started again, it goes on from what it saved.

What was submitted is known by files alone. `slurm/NAME/tasks.json` in the sweep's folder has the
runs of one array in order, and NAME is the name of its jobs; it is written before the array is
submitted. So whoever types the command again learns from squeue which runs are on their way, at
whatever moment the process before was killed. There may be no accounting (sacct), so nothing else
is asked: a job that squeue does not show has ended, and its run's folder says how.
"""

import contextlib
import dataclasses
import io
import itertools
import logging
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from normlab import run
from normlab.environment import RECORDED, entry_environment, thread_environment
from normlab.errors import MachineFault, UserError, one_line, unknown
from normlab.launchers import task
from normlab.pool import Event, Tracker, settled_state, unsettled
from normlab.report.live import LiveRun, refresh
from normlab.sweep import Plan, PlannedRun
from normlab.worker import summary

_LOG = logging.getLogger(__name__)

LARGEST_ARRAY = 1000  # SLURM's MaxArraySize is 1001 unless set, one more than the largest index
MOST_RESTARTS = 1000  # a run whose time is up before its first step would come back for ever
LOOKS = 3  # how often a job must be missing: a shared file system may show its last words late
PATIENCE_SECONDS = 600.0  # how long squeue may fail: a controller that is started anew is back soon


@dataclasses.dataclass(frozen=True)
class Slurm:
    """SLURM, with options of its jobs; what is not given is left to the cluster."""

    partition: str | None = None
    time: str = "60"  # of a job, as sbatch takes it; a longer run takes several turns
    cpus: int | None = None  # of a job; as many as the run has threads
    gpus: int = 0
    memory: float | None = None  # GB
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    grace: int = 90  # seconds before the end of the time at which the run is told
    poll: float = 10.0  # seconds between two looks at the queue

    def __post_init__(self) -> None:
        if minutes(self.time) * 60 <= self.grace:
            raise UserError(
                f"launcher: time={self.time!r} ({minutes(self.time)} min) must be longer than "
                f"grace={self.grace} s, in which the run is saved"
            )

    def __call__(
        self,
        plan: Plan,
        folder: Path,
        jobs: int | None,
        threads: int,
        on_event: Callable[[Event], None],
    ) -> dict[str, str]:
        """Submits what is neither done nor in the queue, and waits for all of it.

        Returns {run id: state}. Ctrl-C ends the waiting and leaves the jobs where they are.
        """
        submitit = _submitit()
        states, pending = unsettled(plan, folder)
        if not pending:
            return {run_id: state or "planned" for run_id, state in states.items()}
        _check_partition(self.partition)
        tracker = Tracker(pending, len(states), on_event)
        queued = queue(folder)
        new = [planned for planned in pending if planned.id not in queued]
        if len(new) < len(pending):
            _LOG.warning("%d runs are in the queue already", len(pending) - len(new))
        with _leaving(folder):
            chunks = [new[i : i + LARGEST_ARRAY] for i in range(0, len(new), LARGEST_ARRAY)]
            for chunk in chunks:
                # Each array has a throttle of its own.
                share = max(1, (jobs or LARGEST_ARRAY) // len(chunks))
                self._submit(submitit, chunk, folder, share, threads)
            return self._follow(pending, folder, states, tracker)

    def _submit(
        self, submitit: Any, runs: Sequence[PlannedRun], folder: Path, at_once: int, threads: int
    ) -> None:
        """Submits one array, `at_once` jobs of which may run at a time. Raises UserError."""
        name = f"normlab-{secrets.token_hex(4)}"
        home = folder.resolve() / "slurm" / name
        home.mkdir(parents=True)
        tasks = home / "tasks.json"
        run.write_text(tasks, task.as_text(runs, folder.resolve()))
        try:
            executor = submitit.SlurmExecutor(folder=home)
            executor.update_parameters(**self.parameters(name, at_once, threads))
            count = len(runs)
            with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats what sbatch says
                jobs = executor.map_array(job, [str(tasks)] * count, range(count))
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            shutil.rmtree(home)
            raise UserError(f"SLURM refused the jobs: {_reason(error)}") from error
        number = jobs[0].job_id.partition("_")[0]
        runs_text = f"{count} run" + "s" * (count > 1)
        _LOG.warning("submitted %s as SLURM's job %s (%s)", runs_text, number, name)

    def parameters(self, name: str, at_once: int, threads: int) -> dict[str, Any]:
        """Returns what submitit is told about an array, in submitit's words."""
        cpus = self.cpus or threads
        chosen = {
            "partition": self.partition,
            "gpus_per_node": self.gpus or None,
            "mem": None if self.memory is None else f"{round(self.memory * 1024)}MB",
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
        }
        return {
            "job_name": name,
            "time": minutes(self.time),
            "cpus_per_task": cpus,
            # From SLURM 22.05 on srun does not take this over from the job.
            "srun_args": [f"--cpus-per-task={cpus}"],
            "signal_delay_s": self.grace,
            "array_parallelism": at_once,
            "setup": [f"export {key}={shlex.quote(x)}" for key, x in _environment(threads).items()],
            "additional_parameters": {"requeue": True},
            **{key: value for key, value in chosen.items() if value is not None},
        }

    def _follow(
        self,
        pending: Sequence[PlannedRun],
        folder: Path,
        states: dict[str, str | None],
        tracker: Tracker,
    ) -> dict[str, str]:
        """Looks at queue and folders until each run is settled or its job is gone."""
        waiting = {planned.id: planned for planned in pending}
        lives = {run_id: LiveRun(folder / run_id) for run_id in waiting}
        missed: Counter[str] = Counter()
        while waiting:
            queued = _patiently(folder)
            for run_id, planned in list(waiting.items()):
                if queued.get(run_id) == "PENDING":
                    missed[run_id] = 0
                    continue
                live = lives[run_id]
                refresh(live)
                missed[run_id] = 0 if run_id in queued else missed[run_id] + 1
                state = settled_state(folder / run_id)
                if state is not None:
                    states[run_id] = state
                    result = run.read_result(folder / run_id)
                    assert result is not None
                    message = summary(result)
                elif missed[run_id] >= LOOKS:
                    # Nobody writes any more what has neither a job nor an end.
                    states[run_id] = "failed" if live.state == "planned" else live.state
                    message = _last_words(folder, run_id, live)
                else:
                    if live.num_steps:
                        tracker.advance(planned, live.step / live.num_steps)
                    continue
                del waiting[run_id]
                tracker.end(planned, message)
            if waiting:
                time.sleep(self.poll)
        return {run_id: state or "planned" for run_id, state in states.items()}


def minutes(text: str) -> int:
    """Returns a time limit as sbatch takes it, in minutes, rounded up. Raises UserError.

    "M", "M:S", "H:M:S", "D-H", "D-H:M" and "D-H:M:S".
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not found:
        raise UserError(f"launcher: time={text!r} is no time; e.g. 90, 4:00:00 or 2-12")
    days, *rest = (None if part is None else int(part) for part in found.groups())
    numbers = [part for part in rest if part is not None]
    if days is not None:  # hours come first
        numbers += [0] * (3 - len(numbers))
    elif len(numbers) < 3:  # minutes do
        numbers = [0, *numbers, *[0] * (2 - len(numbers))]
    hours, mins, seconds = numbers
    whole = ((days or 0) * 24 + hours) * 60 + mins
    return whole + (seconds > 0) + max(0, (seconds - 1) // 60)


# The queue ---------------------------------------------------------------------------------------


def queue(folder: Path) -> dict[str, str]:
    """Returns {run id: SLURM's state} of the runs of a sweep whose jobs are in the queue.

    Raises MachineFault if squeue cannot be asked.
    """
    homes = {path.parent.name: path for path in (folder / "slurm").glob("*/tasks.json")}
    if not homes:
        return {}
    shown = _command(
        *("squeue", "--noheader", "--array", "--format=%j|%K|%T", f"--name={','.join(homes)}")
    )
    found = {}
    for name, index, state in table(shown):
        found[task.read_tasks(homes[name])[index]["id"]] = state
    return found


def table(shown: str) -> Iterator[tuple[str, int, str]]:
    """Yields (name, index, state) of lines `name|index|state`; N/A is a job without an array."""
    for line in shown.splitlines():
        name, index, state = line.strip().split("|")
        yield name, int(index) if index.isdigit() else 0, state


def _patiently(folder: Path) -> dict[str, str]:
    """Returns `queue`, asking again for a while where SLURM does not answer."""
    until = time.monotonic() + PATIENCE_SECONDS
    for pause in itertools.count(1):
        try:
            return queue(folder)
        except MachineFault:
            if time.monotonic() > until:
                raise
            time.sleep(min(pause, 30))
    raise AssertionError


def _last_words(folder: Path, run_id: str, live: LiveRun) -> str:
    """Returns why a run has ended, as far as its folder knows, and where its job's log is."""
    logs = []
    for path in sorted(
        (folder / "slurm").glob("*/tasks.json"), key=lambda path: path.stat().st_mtime
    ):
        ids = [entry["id"] for entry in task.read_tasks(path)]
        if run_id in ids:
            pattern = f"*_{ids.index(run_id)}_0_log.err" if len(ids) > 1 else "*_0_log.err"
            logs += sorted(path.parent.glob(pattern))
    message = str(live.status.get("message", "") or "its job ended without a word")
    state = "failed" if live.state == "planned" else live.state
    return f"{state}: {message}" + (f" (see {logs[-1]})" if logs else "")


# One job -----------------------------------------------------------------------------------------

TIME_IS_UP = (signal.SIGUSR1, signal.SIGUSR2)


def job(tasks: str, index: int) -> None:
    """Trains one run of an array, in the process of a job, and exits unless all is well."""
    for number in TIME_IS_UP:  # before and after the training, which has handlers of its own
        signal.signal(number, _leave)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit would pass over it
    outcome = task.run_indexed(Path(tasks), index)
    print(outcome["message"], flush=True)
    if outcome.get("signal") in TIME_IS_UP:
        _requeue()
    if code := task.exit_code(outcome):
        sys.exit(code)


def _leave(number: int, _frame: Any) -> NoReturn:
    _requeue()
    os._exit(128 + number)  # nothing is to be saved here


def _requeue() -> None:
    """Puts this process's job back into the queue."""
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= MOST_RESTARTS:
        print(f"not requeued: it has been {MOST_RESTARTS} times", flush=True)
        return
    # The number of a job of an array may be the array's own, which would requeue all of it.
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    number = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    print(f"requeueing job {number}", flush=True)
    subprocess.run(["scontrol", "requeue", number], check=True, timeout=60)


# Around it ---------------------------------------------------------------------------------------


def _environment(threads: int) -> dict[str, str]:
    """Returns the variables of a job's process, which a site's sbatch may not pass on by itself."""
    kept = {name: os.environ[name] for name in (*RECORDED, "PYTHONPATH") if name in os.environ}
    kept.pop("CUDA_VISIBLE_DEVICES", None)  # SLURM's to say
    return {**kept, **entry_environment(), **thread_environment(threads)}


def _submitit() -> Any:
    """Returns the module. Raises UserError, one line, if it or SLURM is not there."""
    try:
        import submitit
    except ImportError as error:
        raise UserError(
            "the launcher 'slurm' needs submitit; install it by: pip install 'normlab[cluster]'"
        ) from error
    for command in ("sbatch", "squeue"):
        if shutil.which(command) is None:
            raise UserError(
                f"the launcher 'slurm' needs SLURM, and there is no {command} here; "
                "type this on a login node, or take --launcher=local"
            )
    return submitit


def _check_partition(name: str | None) -> None:
    if name is not None:
        there = [
            line.strip() for line in _command("sinfo", "--noheader", "--format=%R").split("\n")
        ]
        if name not in there:
            raise unknown("partition", name, sorted({*filter(None, there)}))


def _command(*words: str) -> str:
    """Returns what a command of SLURM prints. Raises MachineFault."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise MachineFault(f"{words[0]} failed: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Returns one line of what a command printed when it failed; the last one says most."""
    printed = getattr(error, "stderr", None) or str(error)
    text = printed.decode(errors="replace") if isinstance(printed, bytes) else printed
    lines = [line for line in text.splitlines() if line.strip()]
    return one_line(ValueError(lines[-1])) if lines else type(error).__name__


class Left(Exception):
    """A signal ended the waiting for jobs, which go on."""

    def __init__(self, folder: Path, number: int) -> None:
        self.exit_code = 128 + number
        names = ",".join(
            sorted(path.parent.name for path in (folder / "slurm").glob("*/tasks.json"))
        )
        super().__init__(
            f"stopped waiting by {signal.Signals(number).name}; the jobs go on, the same command "
            f"waits for them again, and 'scancel --name={names}' ends them"
        )


@contextlib.contextmanager
def _leaving(folder: Path) -> Iterator[None]:
    """Makes SIGINT and SIGTERM raise `Left`."""

    def leave(number: int, _frame: Any) -> NoReturn:
        raise Left(folder, number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
