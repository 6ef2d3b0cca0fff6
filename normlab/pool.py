"""Many runs, done: skip what is finished, spread the rest over worker processes.

The same plan skips done runs, resumes cut-off ones, retries failed ones and adds new ones. Workers
are processes (`normlab.worker`), so a crash takes down its process's runs and nothing else.
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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from normlab import run, ways
from normlab.environment import (
    entry_environment,
    has_accelerator,
    is_deterministic,
    may_have_devices,
    thread_environment,
)
from normlab.errors import UserError
from normlab.sweep import Plan, PlannedRun
from normlab.ways import Way

ATTEMPTS = 2  # a run whose worker died is resumed once
ORPHAN_SECONDS = 120.0  # how long a run waits for a worker of an earlier sweep to leave


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened to a run of a sweep."""

    label: str
    message: str
    ended: bool  # the run's end, as opposed to a sign of life
    finished: int  # runs ended so far, those found done included
    total: int  # distinct runs of the plan
    fraction: float  # share of the work still to do at the start that is done now, 0 to 1


def run_plan(
    plan: Plan,
    folder: Path,
    jobs: int | None,
    threads: int,
    on_event: Callable[[Event], None],
    seeds: str = "auto",
) -> dict[str, str]:
    """Runs what is not done; returns {run id: state} of every run of the plan.

    `jobs` runs at a time, a process each; None: the way of `ways.WAYS` that `seeds` names, or if it
    is `auto` and there is more than one, the fastest. `on_event` is called from one thread at a
    time. At a SIGINT or SIGTERM the workers save their runs. To be called from the main thread.
    """
    states, pending = unsettled(plan, folder)
    tracker = Tracker(pending, len(states), on_event)
    most = min(jobs or default_jobs(threads), len(pending))
    workers = [_Worker(folder, threads, number) for number in range(most)]

    def lead() -> None:
        way = Way("processes", most) if jobs else _way(seeds, pending, workers, tracker)
        tasks: queue.SimpleQueue[list[PlannedRun]] = queue.SimpleQueue()
        for group in ways.groups(pending, way.together):
            tasks.put(group)
        for worker in workers[way.workers :]:
            worker.close()
        for worker in workers:
            worker.by_device = way.name == "devices"
        work = [partial(_work, x, tasks, folder, states, tracker) for x in workers[: way.workers]]
        _all_of(work, workers)

    if pending:
        received: list[int] = []

        def note_signal(number: int, _frame: Any) -> None:
            # Raised here, it would come out of `Thread.join`, which then takes the thread for dead.
            received.append(number)

        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, note_signal) for number in numbers}
        try:
            _all_of([lead], workers, received)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return {run_id: state or "planned" for run_id, state in states.items()}


def _all_of(
    works: Sequence[Callable[[], None]], workers: Sequence["_Worker"], received: Sequence[int] = ()
) -> None:
    """Does each work in a thread; if one fails, or a signal was received, stops the workers.

    Waits then until they have saved their runs, and raises what failed, or Stopped.
    """
    faults: list[BaseException] = []

    def do(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as fault:
            faults.append(fault)

    hands = [threading.Thread(target=do, args=(work,), daemon=True) for work in works]
    try:
        for hand in hands:
            hand.start()
        for hand in hands:
            while hand.is_alive():
                hand.join(timeout=0.2)
                if faults or received:
                    break
        if received:
            raise Stopped(received[0])
        if faults:
            raise faults[0]
    except BaseException:
        for worker in workers:
            worker.stop()
        for hand in hands:
            if hand.ident is not None:
                hand.join()
        for worker in workers:
            worker.close()
        raise


def _way(
    seeds: str, pending: list[PlannedRun], workers: list["_Worker"], tracker: "Tracker"
) -> Way:
    """Returns the way that `seeds` asks for; measures and says it if that is `auto`."""

    def measure(worker: int, runs: Sequence[PlannedRun], steps: int | None) -> dict[str, Any]:
        return workers[worker].measure(runs, steps)

    if seeds == "loop":
        return Way("loop", 1)
    if seeds == "processes" or (seeds == "auto" and len(pending) == 1):
        return Way("processes", len(workers))
    if seeds == "devices":
        found = measure(0, pending[:1], 1)
        if found.get("devices", 1) == 1:
            why = found.get("message", "there is one device")
            tracker.say("seeds at a time", f"one after another: {why}")
        return Way("devices", 1, found.get("devices", 1))
    if sum(planned.steps for planned in pending) < ways.WORTH_MEASURING:
        return Way("processes", len(workers))
    if len(workers) == 1 and not may_have_devices():
        return Way("loop", 1)  # there is no other
    way, why = ways.choose(pending, len(workers), measure, by_device=not is_deterministic())
    tracker.say("seeds at a time", why)
    return way


def unsettled(plan: Plan, folder: Path) -> tuple[dict[str, str | None], list[PlannedRun]]:
    """Returns ({run id: done, diverged or None}, the runs that are None), in the plan's order."""
    distinct = {planned.id: planned for planned in reversed(plan.runs)}
    order = list(dict.fromkeys(planned.id for planned in plan.runs))
    states = {run_id: settled_state(folder / run_id) for run_id in order}
    return states, [distinct[run_id] for run_id in order if states[run_id] is None]


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


def settled_state(folder: Path) -> str | None:
    """Returns `done` or `diverged` for a finished run, None for one that is to be run.

    A finished run's status.json, if it is damaged, is written again.
    """
    try:
        result = run.read_result(folder)
    except UserError:
        return None
    if result is None:
        return None
    run.note_result(folder, result)
    return result["status"]


def _work(
    worker: "_Worker",
    tasks: "queue.SimpleQueue[list[PlannedRun]]",
    folder: Path,
    states: dict[str, str | None],
    tracker: "Tracker",
) -> None:
    """Feeds one worker until the tasks or its life end."""
    while not worker.stopped:
        try:
            left = tasks.get_nowait()
        except queue.Empty:
            break
        for planned in left:
            _wait_for_orphan(folder / planned.id)
        tries = [left]
        for attempt in range(ATTEMPTS):
            crashed = []
            for group in tries:
                for planned, outcome in worker.run(group, folder, tracker.advance):
                    if outcome.get("crashed") and not worker.stopped and attempt + 1 < ATTEMPTS:
                        crashed.append([planned])  # by itself now: one may have killed the others
                        continue
                    if outcome["state"] == "failed" or outcome.get("crashed"):
                        note(folder / planned.id, outcome)
                    states[planned.id] = outcome["state"]
                    tracker.end(planned, outcome["message"])
            tries = crashed
    worker.close()


def _ending(code: int) -> str:
    """Returns how a process ended, in words, from its exit code as `subprocess` has it."""
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL), perhaps by the out-of-memory killer"
    if code < 0:
        with contextlib.suppress(ValueError):  # a real-time signal has no name
            return f"was ended by {signal.Signals(-code).name}"
        return f"was ended by signal {-code}"
    return f"ended with exit code {code}"


def note(folder: Path, outcome: Mapping[str, Any]) -> None:
    """Leaves in the run's status what its process could not say, or said before it opened it."""
    if (folder / "identity.json").exists() and not run.is_locked(folder):
        step = run.last_timing(folder).get("step", 0)
        message = outcome["message"].removeprefix("failed: ")
        run.write_status(folder, outcome["state"], int(step or 0), message)


def _wait_for_orphan(folder: Path) -> None:
    """Waits for a worker of a killed sweep to leave the folder.

    Its closed stdin has told it to, but in a compilation it hears that late.
    """
    until = time.monotonic() + ORPHAN_SECONDS
    while run.is_locked(folder) and time.monotonic() < until:
        time.sleep(0.2)


class Tracker:
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

    def say(self, what: str, message: str) -> None:
        """Tells something that is of no single run."""
        with self._lock:
            fraction = sum(self._share.values()) / len(self._share)
            self._on_event(Event(what, message, True, self._finished, self._total, fraction))

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


def _described(planned: PlannedRun) -> dict[str, Any]:
    return {"source": planned.source, "overrides": dict(planned.overrides)}


class _Worker:
    """A worker process, started when first needed and started again after a crash."""

    def __init__(self, folder: Path, threads: int, number: int) -> None:
        self._log = folder / f"worker-{number}.log"
        self._threads = threads
        self._process: subprocess.Popen[str] | None = None
        self.stopped = False
        self.by_device = False  # train each run on a device of its own

    def run(
        self,
        group: list[PlannedRun],
        folder: Path,
        on_progress: Callable[[PlannedRun, float], None],
    ) -> Iterator[tuple[PlannedRun, dict[str, Any]]]:
        """Yields (run, {"state", "message"}) of each run; with "crashed" if the process died.

        Several runs are trained at a time.
        """
        left = dict(enumerate(group))
        if self.stopped:
            lost = {"state": "interrupted", "message": "stopped before it began"}
        else:
            runs = [
                {**_described(planned), "workdir": str(folder / planned.id)} for planned in group
            ]
            for reply in self._replies({"runs": runs, "by_device": self.by_device}):
                if "state" in reply:
                    yield left.pop(reply["run"]), reply
                else:
                    on_progress(left[reply["run"]], reply["progress"])
                if not left:
                    return
            lost = self._ended()
        for planned in left.values():
            yield planned, lost

    def measure(self, group: Sequence[PlannedRun], steps: int | None) -> dict[str, Any]:
        """Returns what `training.pace` finds of the runs, a device each if they are several.

        With a "message" in its place if it fails.
        """
        if self.stopped:
            return {"message": "stopped"}
        task = {"measure": list(map(_described, group)), "seconds": ways.SECONDS, "steps": steps}
        for reply in self._replies(task):
            return reply
        return self._ended()

    def _replies(self, task: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the process is gone
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            yield json.loads(line)

    def _ended(self) -> dict[str, Any]:
        """Returns how the process came to its end, which it has."""
        assert self._process is not None
        code = self._process.wait()
        self._process = None
        state = "interrupted" if self.stopped else "failed"
        return {"state": state, "message": f"its process {_ending(code)}", "crashed": True}

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
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()
