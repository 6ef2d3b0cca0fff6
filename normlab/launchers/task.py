"""One planned run, in a process that somebody else started: a job of a cluster, a pod.

    python -m normlab.launchers.task TASKS.json [INDEX]

TASKS.json is what `write_tasks` wrote. INDEX counts from 0; without it the variable
JOB_COMPLETION_INDEX says which, as Kubernetes sets it in a pod of an indexed job. Ends with 0 if
the run is done or diverged, 1 if it failed, 2 for a mistake in config or command, and 128 + n after
the signal n, the run being saved.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from normlab import pool, run
from normlab.environment import reexecute
from normlab.errors import UserError
from normlab.sweep import PlannedRun
from normlab.worker import run_task

MODULE = "normlab.launchers.task"
INDEX = "JOB_COMPLETION_INDEX"


def as_text(runs: Sequence[PlannedRun], folder: Path) -> str:
    """Returns the tasks of runs as JSON; `folder` is the sweep's, where the runs are computed."""
    tasks = [
        {
            "id": planned.id,
            "source": planned.source,
            "overrides": dict(planned.overrides),
            "workdir": str(folder / planned.id),
        }
        for planned in runs
    ]
    return json.dumps({"tasks": tasks}, indent=1) + "\n"


def read_tasks(path: Path) -> list[dict[str, Any]]:
    """Returns the tasks of a file. Raises UserError if it is none."""
    tasks = (run.read_json(path) or {}).get("tasks")
    if not isinstance(tasks, list):
        raise UserError(f"{path} holds no tasks")
    return tasks


def run_indexed(path: Path, index: int) -> dict[str, Any]:
    """Trains the run number `index` of a file; returns what `worker.run_task` does.

    Raises UserError if there is no such task.
    """
    tasks = read_tasks(path)
    if not 0 <= index < len(tasks):
        raise UserError(f"{path} has the tasks 0 to {len(tasks) - 1}, no task {index}")
    task = tasks[index]
    outcome = run_task(task, lambda share: None)
    if outcome["state"] == "failed":
        pool.note(Path(task["workdir"]), outcome)
    return outcome


def exit_code(outcome: dict[str, Any]) -> int:
    """Returns what a process ends with after an outcome of `run_indexed`."""
    if "signal" in outcome:
        return 128 + outcome["signal"]
    return 0 if outcome["state"] in ("done", "diverged") else outcome.get("exit_code", 1)


def main() -> NoReturn:
    """Runs the task that the arguments and the environment name, and exits."""
    arguments = sys.argv[1:]
    reexecute(arguments, module=MODULE)
    try:
        path, index = [*arguments, os.environ.get(INDEX, "")][:2]
        if not index.isdigit():
            raise ValueError
    except ValueError:
        print(f"usage: python -m {MODULE} TASKS.json [INDEX], or {INDEX} set", file=sys.stderr)
        sys.exit(2)
    try:
        outcome = run_indexed(Path(path), int(index))
    except UserError as error:
        print(f"normlab: {error}", file=sys.stderr)
        sys.exit(2)
    print(outcome["message"], flush=True)
    sys.exit(exit_code(outcome))


if __name__ == "__main__":
    main()
