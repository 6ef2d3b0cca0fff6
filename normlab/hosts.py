"""The processes of one run on several machines: which of them this one is, and who watches it.

Imports no JAX. What they do together stands in `training/processes.py`.
"""

import ctypes
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping

from normlab.environment import entry_environment
from normlab.errors import UserError

TIMEOUT_SECONDS = 120
"""How long a process that does not come, or gives no sign of life, is waited for."""

_WATCHED = "NORMLAB_WATCHED"
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclasses.dataclass(frozen=True)
class Place:
    """Which process of a run this one is."""

    coordinator: str  # HOST:PORT, where process 0 listens
    count: int  # of processes
    index: int  # from 0


def find_place(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Place:
    """Returns the place that the flags give, and where they are silent the variables that SLURM,
    Kubernetes or a TPU's machine sets in `environment` (default: this process's).

    Raises UserError, one line, for what is missing or cannot be.
    """
    given = {
        "--coordinator": coordinator,
        "--num-processes": num_processes,
        "--process-id": process_id,
    }
    missing = [flag for flag, value in given.items() if value is None]
    found: Mapping[str, tuple[str, str]] = {}  # flag: where its value comes from, and the value
    if missing:
        found = _from_environment(os.environ if environment is None else environment)
    for flag in missing:
        if flag not in found:
            raise UserError(
                f"--distributed needs {flag}: no variable of SLURM, Kubernetes or a TPU says it"
            )
    said = {flag: (flag, str(value)) for flag, value in given.items() if value is not None}
    said = {**found, **said}
    place = Place(
        said["--coordinator"][1], _whole(*said["--num-processes"]), _whole(*said["--process-id"])
    )
    _check(place, {flag: name for flag, (name, _) in said.items()})
    return place


def _whole(name: str, text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"{name}={text} must be a whole number from 0")
    return int(text)


def _check(place: Place, names: Mapping[str, str]) -> None:
    """Raises UserError; `names` says where the value of each flag comes from."""
    host, colon, port = place.coordinator.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(
            f"{names['--coordinator']}={place.coordinator} must be HOST:PORT of process 0, "
            "e.g. 10.0.0.1:29400"
        )
    if place.count < 1:
        raise UserError(f"{names['--num-processes']}={place.count} must be 1 or more")
    if place.index >= place.count:
        raise UserError(
            f"{names['--process-id']}={place.index} must be from 0 to {place.count - 1} "
            f"({names['--num-processes']}={place.count})"
        )


def check_reachable(place: Place, seconds: float = 20.0) -> None:
    """Raises UserError if the coordinator's host has no address after so long.

    The name of a pod or a node may be known only a while after it starts.
    """
    host = place.coordinator.rpartition(":")[0].strip("[]")
    end = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"the coordinator's host {host!r} has no address: {error.strerror}"
                ) from error
        time.sleep(0.5)


# Environments ------------------------------------------------------------------------------------


def _from_environment(environment: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Returns {flag: (where from, value)} of the first of the environments that this one is."""
    for looks in (_slurm, _kubernetes, _tpu):
        found = looks(environment)
        if found:
            return found
    return {}


def _slurm(environment: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """The step that `srun` starts: a task a process. The port follows from job and step."""
    if "SLURM_JOB_ID" not in environment:
        return {}
    names = ("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_ID")
    if not all(name in environment for name in names):
        raise UserError("--distributed in a SLURM job: start it with srun, which says who is who")
    nodes, count, index, step = (environment[name] for name in names)
    if not first_node(nodes):
        raise UserError(
            f"SLURM_STEP_NODELIST={nodes!r} is no list of nodes, e.g. node[07-12],login"
        )
    job = _whole("SLURM_JOB_ID", environment["SLURM_JOB_ID"])
    # Above the ports that Linux hands out by itself, which end at 60999.
    port = 61440 + (job + _whole("SLURM_STEP_ID", step)) % 4096
    return {
        "--coordinator": ("SLURM_STEP_NODELIST", f"{first_node(nodes)}:{port}"),
        "--num-processes": ("SLURM_STEP_NUM_TASKS", count),
        "--process-id": ("SLURM_PROCID", index),
    }


def first_node(nodes: str) -> str:
    """Returns the first name of a list as SLURM writes it: node[007-012,31],login -> node007.

    "" if that is no list.
    """
    match = re.match(r"([^,\[\]]*)(?:\[(\w+)[^\[\]]*\])?([^,\[\]]*)(?:,|$)", nodes)
    return "".join(part or "" for part in match.groups()) if match else ""


def _kubernetes(environment: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """A pod of an indexed Job. Kubernetes sets the index; address and number are the manifest's."""
    if "JOB_COMPLETION_INDEX" not in environment:
        return {}
    found = {"--process-id": ("JOB_COMPLETION_INDEX", environment["JOB_COMPLETION_INDEX"])}
    manifest = {
        "--coordinator": "JAX_COORDINATOR_ADDRESS",
        "--num-processes": "JAX_NUM_PROCESSES",
    }
    for flag, name in manifest.items():
        if name in environment:
            found[flag] = (name, environment[name])
    # On GKE's TPUs the pods of a Job have a TPU's variables, too.
    return found if len(found) == 3 else {**found, **_tpu(environment)}


def _tpu(environment: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """A machine of a TPU slice, as GKE and Cloud TPU describe it."""
    names = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if "TPU_WORKER_ID" not in environment or not names[0]:
        return {}
    if environment.get("MEGASCALE_NUM_SLICES", "1") != "1":
        raise UserError(
            "--distributed over several TPU slices needs --coordinator, --num-processes and "
            "--process-id: TPU_WORKER_ID counts within one slice"
        )
    return {
        "--coordinator": ("TPU_WORKER_HOSTNAMES", f"{names[0]}:8476"),
        "--num-processes": ("TPU_WORKER_HOSTNAMES", str(len(names))),
        "--process-id": ("TPU_WORKER_ID", environment["TPU_WORKER_ID"]),
    }


# Watching ----------------------------------------------------------------------------------------


def is_watched() -> bool:
    """Returns whether `watch` has started this process."""
    return _WATCHED in os.environ


def watch(arguments: list[str], place: Place, timeout: int) -> int:
    """Runs `python -m normlab ARGUMENTS` in a process of its own; returns the exit code.

    JAX aborts a process whose coordinator is gone, or that hears from it that another is, or waits
    for one longer than `timeout` seconds: that cannot be caught from within. So this one waits
    outside and says what happened. It hands on the signals that it gets, and its end, even by
    SIGKILL, is the other's end.
    """
    libc = ctypes.CDLL(None)
    child = subprocess.Popen(
        [sys.executable, "-m", "normlab", *arguments],
        env={**os.environ, **entry_environment(), _WATCHED: "1"},
        stderr=subprocess.PIPE,
        text=True,
        errors="backslashreplace",
        process_group=0,  # Ctrl-C at a terminal reaches it once: from here
        preexec_fn=lambda: libc.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL),
    )
    before = {
        number: signal.signal(number, lambda number, _: child.send_signal(number))
        for number in _FORWARDED
    }
    heard = _Heard()
    listener = threading.Thread(target=heard.listen, args=(child.stderr,), daemon=True)
    listener.start()
    try:
        code = child.wait()
        listener.join(timeout=5)  # what it has started itself may hold the pipe open
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    # JAX may abort while Python says so itself: the line may stand amid JAX's own.
    torn = any(_LOST in line for line in heard.last_words)
    if torn or (code == -signal.SIGABRT and heard.last_words):
        message = lost(place.index, place.count, timeout)
    else:
        message = _death(-code, place) if code < 0 else ""
        if not heard.said_lost:
            sys.stderr.writelines(heard.last_words)
    if message and not heard.said_lost:
        print(f"normlab: {message}", file=sys.stderr, flush=True)
    if -code in _FORWARDED:
        return 128 - code
    return code if code >= 0 else 1


class _Heard:
    """What a process writes to stderr, handed on line by line, but for what JAX says of its abort.

    That begins with lines of C++'s logs and ends in a stack trace.
    """

    _DYING = re.compile(r"[EF]\d{4} [\d:.]+ +\d+ (coordination_service|client\.h)")

    def __init__(self) -> None:
        self.last_words: list[str] = []
        self.said_lost = False  # it found by itself that another process has ended

    def listen(self, lines: Iterable[str]) -> None:
        """Reads to the end of `lines`."""
        for line in lines:
            own = line.startswith("normlab: ")
            self.said_lost |= own and _LOST in line
            if not own and (self.last_words or self._DYING.match(line)):
                self.last_words.append(line)
            else:
                sys.stderr.write(line)
                sys.stderr.flush()


_LOST = "stops: another process has ended"
_RESTART = "start all processes again with the same command, and the run goes on"


def lost(index: int, count: int, timeout: int | None = None) -> str:
    """Returns the line of process `index` of `count` that finds another one gone.

    With `timeout`, the seconds for which it may have waited to hear from it.
    """
    silent = "" if timeout is None else f" or was not heard of for {timeout} seconds"
    return f"process {index} of {count} {_LOST}{silent}; {_RESTART}"


def _death(number: int, place: Place) -> str:
    """Returns the line about a process that died of a signal."""
    why = " (the out-of-memory killer?)" if number == signal.SIGKILL else ""
    name = signal.Signals(number).name
    return f"process {place.index} of {place.count} was ended by {name}{why}; {_RESTART}"
