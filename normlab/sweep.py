"""Many runs: plan them, skip what is done, spread the rest over worker processes.

A plan is a list of labelled configs. Runs are content-addressed (`config.run_id`): the same command
skips done runs, resumes cut-off ones, retries failed ones and adds new ones, and settings that
cannot differ share one run. Workers are processes (`normlab.worker`), so a crash takes down one run
and nothing else.
"""

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from normlab import run
from normlab.environment import entry_environment, has_accelerator, thread_environment
from normlab.errors import UserError, unknown

ATTEMPTS = 2  # a run whose worker died is resumed once


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One labelled run of a plan; two of them may have the same id."""

    id: str
    labels: Mapping[str, Any]  # setting, norm, seed
    source: str  # config file and choices
    overrides: Mapping[str, Any]  # {dotted name: value}

    @property
    def label(self) -> str:
        """A few words for a line of progress."""
        return f"{self.labels['setting']} · {self.labels['norm']} · seed {self.labels['seed']}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a comparison is made of."""

    config: str
    norms: tuple[str, ...]
    settings: Mapping[str, Mapping[str, str]]
    seeds: tuple[int, ...]
    overrides: Mapping[str, str]  # of all runs
    runs: tuple[PlannedRun, ...]


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened to a run of a sweep."""

    label: str
    message: str
    ended: bool  # the run's end, as opposed to a sign of life
    finished: int  # runs ended so far, those found done included
    total: int  # distinct runs of the plan
    fraction: float  # share of the work still to do at the start that is done now, 0 to 1


# Plan --------------------------------------------------------------------------------------------


def make_plan(
    source: str,
    *,
    norms: Iterable[str],
    settings: Mapping[str, Mapping[str, str]],
    seeds: Iterable[int],
    overrides: Mapping[str, str],
) -> Plan:
    """Returns the runs of norms × settings × seeds over one config.

    `source` is FILE.py[:choices] without `norm`. An override of a field `norm.*` goes to those
    normalizers that have the field. Every config is built (without computing) before any runs, so a
    mistake in one setting is found before the first run starts. Raises UserError.
    """
    from normlab.config import flatten, load_config
    from normlab.norms import NORMS
    from normlab.training.setup import build_parts, id_of

    norms, seeds = tuple(dict.fromkeys(norms)), tuple(seeds)
    for changes in (overrides, *settings.values()):
        if "seed" in changes:
            raise UserError(f"seed={changes['seed']} is set; a comparison has the seeds of --seeds")
    for norm in norms:
        if norm not in NORMS:
            raise unknown("norm", norm, NORMS)
    if not norms:
        raise UserError("--norms names no normalizer")
    path, _, choices = source.partition(":")
    if any(part.strip().startswith("norm=") for part in choices.split(",")):
        raise UserError(f"config {source!r} chooses a norm; a comparison takes them from --norms")
    sources = {
        norm: f"{path}:{','.join(filter(None, [choices, f'norm={norm}']))}" for norm in norms
    }
    fields = {norm: set(flatten(load_config(sources[norm]))) for norm in norms}
    everywhere = set().union(*fields.values())

    runs = []
    for seed in seeds:
        for setting, changes in settings.items():
            for norm in norms:
                chosen = {
                    name: value
                    for name, value in {**overrides, **changes, "seed": seed}.items()
                    if name in fields[norm] or name not in everywhere
                }
                config = load_config(sources[norm], chosen)
                if seed == seeds[0]:
                    build_parts(config)
                labels = {"setting": setting, "norm": norm, "seed": seed}
                runs.append(PlannedRun(id_of(config), labels, sources[norm], chosen))
    plain = {name: dict(changes) for name, changes in settings.items()}
    return Plan(source, norms, plain, seeds, dict(overrides), tuple(runs))


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Makes the folder and holds its lock; raises UserError if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with run.locked(folder):
            yield
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"workdir {str(folder)!r} cannot be written: {error.strerror}") from error


def write_plan(plan: Plan, folder: Path, *, redo_other_commits: bool = False) -> None:
    """Writes sweep.json: the planned runs, with those of an earlier plan in the folder.

    Raises UserError, and writes nothing, if the folder holds something else, a comparison of
    another config, or another run under the same label. With `redo_other_commits`, runs of another
    commit are renamed to `ID.old-N`, so that they are run again.
    """
    earlier = _earlier_plan(folder) or _as_json(dataclasses.replace(plan, runs=()))
    _check_same_meaning(earlier, _as_json(plan), folder)
    entries = {_label_key(entry["labels"]): entry for entry in earlier["runs"]}
    for planned in plan.runs:
        entry = {"id": planned.id, "labels": dict(planned.labels)}
        there = entries.setdefault(_label_key(planned.labels), entry)
        if there["id"] != planned.id:
            raise UserError(
                f"workdir {str(folder)!r} has another run as {planned.label!r}"
                f"{_why_other(folder / there['id'], planned)}; "
                "choose another folder or setting name"
            )
    if redo_other_commits:
        _set_aside_other_commits(plan, folder)
    data = _as_json(plan) | {
        "settings": {**earlier["settings"], **plan.settings},
        "norms": list(dict.fromkeys([*earlier["norms"], *plan.norms])),
        "seeds": sorted({*earlier["seeds"], *plan.seeds}),
        "runs": list(entries.values()),
    }
    run.write_json(folder / run.SWEEP, data)


def _as_json(plan: Plan) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "config": plan.config,
        "overrides": dict(plan.overrides),
        "settings": {name: dict(changes) for name, changes in plan.settings.items()},
        "norms": list(plan.norms),
        "seeds": list(plan.seeds),
        "runs": [{"id": planned.id, "labels": dict(planned.labels)} for planned in plan.runs],
    }


def _earlier_plan(folder: Path) -> dict[str, Any] | None:
    """Returns sweep.json; None in a folder that is new or empty."""
    path = folder / run.SWEEP
    earlier = run.read_json(path) if folder.is_dir() else None
    if earlier is None:
        if folder.is_dir() and any(file.name != "lock" for file in folder.iterdir()):
            raise UserError(f"workdir {str(folder)!r} holds something that is not a comparison")
        return None
    kinds = {"config": str, "overrides": dict, "settings": dict, "norms": list, "seeds": list}
    for name, kind in (kinds | {"runs": list}).items():
        if not isinstance(earlier.get(name), kind):
            raise UserError(f"{path} is damaged: its {name!r} is {earlier.get(name)!r}")
    return earlier


_NO_RESULT = ("checkpoint.", "log.", "parallel.", "data.path")  # fields that change no result


def _check_same_meaning(there: Mapping[str, Any], here: Mapping[str, Any], folder: Path) -> None:
    """Raises UserError where the same name would stand for two things in one table."""

    def refuse(what: str, old: Any, new: Any) -> None:
        raise UserError(
            f"workdir {str(folder)!r} holds a comparison with {what} {old}, not {new}; "
            "choose another folder"
        )

    if there["config"] != here["config"]:
        refuse("config", repr(there["config"]), repr(here["config"]))
    pairs = [("override", there["overrides"], here["overrides"])]
    pairs += [
        (f"setting {name!r}:", there["settings"][name], changes)
        for name, changes in here["settings"].items()
        if name in there["settings"]
    ]
    for what, old, new in pairs:
        for field in dict.fromkeys([*old, *new]):
            a, b = (fields.get(field, "its default") for fields in (old, new))
            if a != b and not field.startswith(_NO_RESULT):
                refuse(f"{what} {field} =", a, b)


def _label_key(labels: Mapping[str, Any]) -> str:
    return json.dumps(labels, sort_keys=True)


def _why_other(folder: Path, planned: PlannedRun) -> str:
    """Returns `: field is a there and b here` for the first difference, "" if it is not known."""
    from normlab.config import load_config
    from normlab.training.setup import run_identity

    there = run.read_json(folder / "identity.json")
    here = run_identity(load_config(planned.source, planned.overrides))
    difference = run.first_difference(there, here) if there else None
    return ": {} is {!r} there and {!r} here".format(*difference) if difference else ""


def _set_aside_other_commits(plan: Plan, folder: Path) -> None:
    commit, _ = run.git_state()
    for run_id in {planned.id for planned in plan.runs}:
        manifest = run.read_json(folder / run_id / "manifest.json")
        if manifest and manifest.get("git_commit") != commit:
            (folder / run_id).rename(run.free_name(folder / f"{run_id}.old"))


# Execution ---------------------------------------------------------------------------------------


def run_plan(
    plan: Plan,
    folder: Path,
    jobs: int | None,
    threads: int,
    on_event: Callable[[Event], None],
) -> dict[str, str]:
    """Runs what is not done; returns {run id: state} of every run of the plan.

    `jobs` runs at a time (default: one for each `threads` cores, or one on an accelerator).
    `on_event` is called from one thread at a time. At a SIGINT or SIGTERM the workers save their
    runs. To be called from the main thread.
    """
    distinct = {planned.id: planned for planned in reversed(plan.runs)}
    order = list(dict.fromkeys(planned.id for planned in plan.runs))
    states = {run_id: _settled_state(folder / run_id) for run_id in order}
    pending = [distinct[run_id] for run_id in order if states[run_id] is None]
    tracker = _Tracker(pending, len(order), on_event)
    jobs = jobs or default_jobs(threads)
    tasks: queue.SimpleQueue[PlannedRun] = queue.SimpleQueue()
    for planned in pending:
        tasks.put(planned)
    workers = [_Worker(folder, threads, number) for number in range(min(jobs, len(pending)))]
    hands = [
        threading.Thread(target=_work, args=(worker, tasks, folder, states, tracker), daemon=True)
        for worker in workers
    ]
    for hand in hands:
        hand.start()
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        for hand in hands:
            while hand.is_alive():
                hand.join(timeout=0.2)
    except BaseException:
        for worker in workers:
            worker.stop()
        for hand in hands:
            hand.join()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return {run_id: state or "planned" for run_id, state in states.items()}


def _stop(number: int, _frame: Any) -> None:
    raise Stopped(number)


class Stopped(Exception):
    """A signal ended a sweep; its runs are saved."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command resumes it")


def default_jobs(threads: int) -> int:
    """Returns how many runs of `threads` cores fit at a time; an accelerator takes one."""
    if has_accelerator():
        return 1
    return max(1, len(os.sched_getaffinity(0)) // threads)


def _settled_state(folder: Path) -> str | None:
    """Returns `done` or `diverged` for a finished run, None for one that is to be run."""
    try:
        result = run.read_result(folder)
    except UserError:
        return None
    return result["status"] if result else None


def _work(
    worker: "_Worker",
    tasks: "queue.SimpleQueue[PlannedRun]",
    folder: Path,
    states: dict[str, str | None],
    tracker: "_Tracker",
) -> None:
    """Feeds one worker until the tasks or its life end."""
    while not worker.stopped:
        try:
            planned = tasks.get_nowait()
        except queue.Empty:
            break
        outcome = {"state": "failed", "message": "the worker process did not start"}
        for _ in range(ATTEMPTS):
            outcome = worker.run(planned, folder / planned.id, tracker.advance)
            if not outcome.get("crashed") or worker.stopped:
                break
        if outcome.get("crashed") and (folder / planned.id).is_dir():
            step = (run.last_timing(folder / planned.id) or {}).get("step", 0)
            run.write_status(folder / planned.id, outcome["state"], int(step), outcome["message"])
        states[planned.id] = outcome["state"]
        tracker.end(planned, outcome["message"])
    worker.close()


class _Tracker:
    """Turns signs of life of many runs into events; one caller at a time."""

    def __init__(
        self, pending: list[PlannedRun], total: int, on_event: Callable[[Event], None]
    ) -> None:
        self._share = {planned.id: 0.0 for planned in pending}
        self._finished = total - len(pending)
        self._total = total
        self._on_event = on_event
        self._lock = threading.Lock()

    def advance(self, planned: PlannedRun, share: float) -> None:
        """Notes that `share` of a run's steps is done."""
        self._emit(planned, share, "", ended=False)

    def end(self, planned: PlannedRun, message: str) -> None:
        """Notes that a run has ended, well or badly."""
        self._emit(planned, 1.0, message, ended=True)

    def _emit(self, planned: PlannedRun, share: float, message: str, ended: bool) -> None:
        with self._lock:
            self._share[planned.id] = share
            self._finished += ended
            fraction = sum(self._share.values()) / len(self._share)
            self._on_event(
                Event(planned.label, message, ended, self._finished, self._total, fraction)
            )


class _Worker:
    """A worker process, started when first needed and started again after a crash."""

    def __init__(self, folder: Path, threads: int, number: int) -> None:
        self._log = folder / f"worker-{number}.log"
        self._threads = threads
        self._process: subprocess.Popen[str] | None = None
        self.stopped = False

    def run(
        self,
        planned: PlannedRun,
        folder: Path,
        on_progress: Callable[[PlannedRun, float], None],
    ) -> dict[str, Any]:
        """Returns {"state", "message"} of the run; with "crashed" if the process died of it."""
        process = self._started()
        task = {
            "source": planned.source,
            "overrides": dict(planned.overrides),
            "workdir": str(folder),
        }
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                reply = json.loads(line)
                if "state" in reply:
                    return reply
                on_progress(planned, reply["progress"])
        except BrokenPipeError:
            pass
        code = process.wait()
        self._process = None
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        state = "interrupted" if self.stopped else "failed"
        return {"state": state, "message": f"its process ended by {how}", "crashed": True}

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            environment = {**os.environ, **thread_environment(self._threads)}
            environment |= entry_environment(environment)
            with self._log.open("a") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "normlab.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment,
                    start_new_session=True,  # a terminal's Ctrl-C comes once, from this process
                )
        return self._process

    def stop(self) -> None:
        """Asks the process to save its run and leave."""
        self.stopped = True
        if self._process is not None:
            self._process.terminate()

    def close(self) -> None:
        """Lets an idle process end, and waits for it."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
