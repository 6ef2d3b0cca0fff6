"""A worker process of a sweep: reads a task a line from stdin, writes replies to stdout.

    {"runs": [{"source": ..., "overrides": {...}, "workdir": ...}], "by_device": false}
        ->  {"run": 0, "progress": 0.4} ... {"run": 0, "state": "done", "message": ...}
    {"measure": [{"source": ..., "overrides": {...}}], "seconds": 1.0, "steps": null}
        ->  {"state": "measured", "devices": 1, "steps": 50, "step_seconds": 0.02}

Several runs of one task are trained at a time, `by_device`: each on a device of its own.

A closed stdin means that the parent is gone: the run is saved and the process leaves.
"""

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normlab.training.programs import Programs


def main() -> None:
    """Serves tasks until stdin closes."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not break the protocol
    tasks: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(tasks,), daemon=True).start()
    from normlab.training.programs import Programs

    programs = Programs()
    while task := tasks.get():
        _serve(json.loads(task), replies, programs)


def _serve(task: Mapping[str, Any], replies: IO[str], programs: "Programs") -> None:
    if "measure" in task:
        _send(replies, _measured(task))
        return
    sending = threading.Lock()

    def send(number: int, reply: Mapping[str, Any]) -> None:
        with sending:
            _send(replies, {"run": number, **reply})

    def one(number: int, seat: Any = None) -> None:
        def on_progress(share: float) -> None:
            send(number, {"progress": share})

        send(number, run_task(task["runs"][number], on_progress, seat, programs))

    if not task["by_device"]:
        one(0)
        return
    from normlab.training.replicas import run_together
    from normlab.training.signals import Signals

    with Signals() as signals:
        run_together([partial(one, number) for number in range(len(task["runs"]))], signals)


def _read(tasks: "queue.SimpleQueue[str]") -> None:
    """Passes tasks on; at the end of stdin asks a run in progress to save and stop."""
    for line in sys.stdin:
        tasks.put(line)
    tasks.put("")
    os.kill(os.getpid(), signal.SIGTERM)


def _measured(task: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `training.pace` finds of so many runs at a time."""
    from normlab.training.pace import pace

    try:
        return {"state": "measured", **pace(task["measure"], task["seconds"], task["steps"])}
    except Exception as error:
        sys.excepthook(*sys.exc_info())
        return {"state": "failed", "message": str(error)}


def run_task(
    task: Mapping[str, Any],
    on_progress: Callable[[float], None],
    seat: Any = None,
    programs: "Programs | None" = None,
) -> dict[str, Any]:
    """Trains one planned run here; returns {"state", "message"}, and raises for no run's fault.

    `task` has source, overrides and workdir. `on_progress` gets the share of the steps done, 0 to
    1. What a signal cut off has "signal", too: its number. What a mistake or the machine stopped
    has "exit_code", that of a command.
    """
    from normlab.config import load_config
    from normlab.errors import MachineFault, UserError
    from normlab.training.loop import train
    from normlab.training.signals import Interrupted

    def progress(step: int, num_steps: int, _line: Mapping[str, Any] | None) -> None:
        on_progress(step / num_steps)

    try:
        config = load_config(task["source"], task["overrides"])
        folder, overrides = task["workdir"], task["overrides"]
        shared = {"overrides": overrides, "progress": progress, "seat": seat, "programs": programs}
        result = train(config, folder, **shared)
    except Interrupted as stop:
        return {"state": "interrupted", "message": str(stop), "signal": stop.exit_code - 128}
    except (UserError, MachineFault) as error:
        return {"state": "failed", "message": f"failed: {error}", "exit_code": error.exit_code}
    except Exception as error:
        sys.excepthook(*sys.exc_info())
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return {"state": "failed", "message": f"failed: {type(error).__name__}: {reason}"}
    return {"state": result["status"], "message": summary(result)}


def summary(result: Mapping[str, Any]) -> str:
    """Returns one line about a finished run."""
    accuracy = result["test_accuracy"]
    seconds = f"{result['seconds']:.1f} s + {result['compile_seconds']:.1f} s compiling"
    return f"{result['status']}, test accuracy {accuracy:.1%} ({seconds})"


def _send(replies: IO[str], reply: Mapping[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
