"""The run folder: the one place that knows its layout. Imports no jax.

config.json       resolved config, reloadable
identity.json     the part of it that makes the run what it is, hashed to the run's id
manifest.json     what the run stood on: commit, versions, devices, threads, seed, hashes
metrics.jsonl     a line an event, no clock in it
timing.jsonl      seconds by step
status.json       running, done, diverged, failed or interrupted
result.json       final metrics
log.txt           warnings and notes
checkpoints/      `training/checkpoint.py`
lock              held while a process writes the folder; it dies with its holder
"""

import contextlib
import fcntl
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from normlab import __version__
from normlab.environment import RECORDED, threads
from normlab.errors import UserError

STATES = ("running", "done", "diverged", "failed", "interrupted")
SWEEP = "sweep.json"
VERDICT = "verdict.json"
_PACKAGES = (
    *("normlab", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml-collections"),
    *("pillow", "scikit-learn", "tensorflow-datasets", "array_record"),  # they decode data
)


# JSON files --------------------------------------------------------------------------------------


def write_json(path: Path, data: Any) -> None:
    """Writes JSON so that the file is at any moment the old one or the whole new one."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file, in UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically: to a neighbour first, then renamed over it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns a JSON object; None if the file is absent.

    Raises UserError if it is not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a JSON object")
    return data


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends one JSON line; a number that is not finite becomes null."""
    clean = {key: finite_or_none(value) for key, value in record.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(clean, allow_nan=False) + "\n")


def finite_or_none(value: Any) -> Any:
    """Returns None for a float that JSON cannot write, any other value as it is."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


LOGS = ("metrics.jsonl", "timing.jsonl")


def log_bytes(folder: Path) -> dict[str, int]:
    """Returns the sizes of the logs, to be kept with a checkpoint."""
    return {name: (folder / name).stat().st_size for name in LOGS if (folder / name).exists()}


def truncate_logs(folder: Path, sizes: Mapping[str, int]) -> None:
    """Cuts the logs back to what they were at a checkpoint.

    The lines after it belong to steps that the resumed run takes, and writes, again.
    """
    for name in LOGS:
        path, size = folder / name, sizes.get(name, 0)
        if path.exists():
            os.truncate(path, min(size, path.stat().st_size))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a log; [] if there is none. A line that is none is passed over.

    (The report shows such lines; a run that could not be finished for one would help nobody.)
    """
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def read_result(folder: Path) -> dict[str, Any] | None:
    """Returns result.json of a finished run; None if it is not finished.

    Raises UserError if the file is there and is no result.
    """
    result = read_json(folder / "result.json")
    if result is None:
        return None
    path = folder / "result.json"
    if result.get("status") not in ("done", "diverged"):
        raise UserError(
            f"{path} has status {result.get('status')!r}, neither 'done' nor 'diverged'; "
            "move it away to train on"
        )
    accuracy = result.get("test_accuracy", "nothing")
    if accuracy is not None and not isinstance(accuracy, (int, float)):
        raise UserError(f"{path} has test_accuracy {accuracy!r}; move it away to train on")
    return result


def note_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes status.json of a finished run again if it is damaged or says something else."""
    with contextlib.suppress(UserError):
        if (read_json(folder / "status.json") or {}).get("status") == result["status"]:
            return
    steps, culprit = result.get("steps"), result.get("diverged_metric")
    message = f"{culprit} not finite from step {result.get('diverged_step')}" if culprit else ""
    write_status(folder, result["status"], steps if isinstance(steps, int) else 0, message)


def last_timing(folder: Path) -> dict[str, float]:
    """Returns the last line of timing.jsonl; {} if there is none."""
    return (read_lines(folder / "timing.jsonl") or [{}])[-1]


def last_train_loss(folder: Path) -> float | None:
    """Returns the training loss of the last line that has one."""
    lines = read_lines(folder / "metrics.jsonl")
    losses = [line.get("loss") for line in lines if line.get("split") == "train"]
    return losses[-1] if losses else None


def free_name(path: Path) -> Path:
    """Returns `path` with the first number behind it, `-1`, `-2`, ..., that nothing bears yet."""
    number = 1
    while (candidate := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return candidate


# The folder --------------------------------------------------------------------------------------


def open_folder(folder: Path, identity_config: dict[str, Any]) -> None:
    """Makes the folder this config's, or checks that it is.

    `identity_config` is `config.identity(...)` of the run, kept in identity.json. Raises UserError
    if the folder cannot be made or written, holds something else, or holds another config's run
    (naming the first field that differs); nothing in it is touched then.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"workdir {str(folder)!r} cannot be written: {reason}") from error
    there = read_json(folder / "identity.json")
    if there is None:
        found = strangers(folder)
        if found:
            raise UserError(
                f"workdir {str(folder)!r} is not a run folder and holds {found[0]!r}; "
                "choose an empty or new folder"
            )
        write_json(folder / "identity.json", identity_config)
        return
    difference = first_difference(there, identity_config)
    if difference and not (folder / "manifest.json").exists():
        # Refused before its first step, e.g. for its data: nothing was run here.
        write_json(folder / "identity.json", identity_config)
    elif difference:
        name, old, new = difference
        raise UserError(
            f"workdir {str(folder)!r} holds the run of another config: "
            f"{name} is {old!r} there and {new!r} here; choose another folder"
        )


def strangers(folder: Path) -> list[str]:
    """Returns what a folder holds beside what a process leaves that was killed in its first write.

    [] if there is no such folder.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [name for name in names if not _FIRST_WRITES.fullmatch(name)]


_FIRST_WRITES = re.compile(r"lock|\.(probe|identity\.json|sweep\.json)\.\d+")


def first_difference(a: dict[str, Any], b: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Returns (dotted name, value in a, value in b) of the first field that differs; else None.

    What a section chose (`kind`) comes before the fields that the choice brought.
    """
    for key in sorted(a | b, key=lambda key: key != "kind"):
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            inner = first_difference(left, right)
            if inner:
                return f"{key}.{inner[0]}", inner[1], inner[2]
        elif left != right:
            return key, left, right
    return None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock; raises UserError if another process holds it."""
    with (folder / "lock").open("a") as file:
        for attempt in range(10):  # `is_locked` of another process holds it for an instant
            if _try_lock(file):
                break
            time.sleep(0.01 * attempt)
        else:
            raise UserError(f"{str(folder)!r} is being written by another process")
        yield


def is_locked(folder: Path) -> bool:
    """True while a living process writes the folder."""
    try:
        with (folder / "lock").open() as file:
            return not _try_lock(file)
    except FileNotFoundError:
        return False


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_status(folder: Path, status: str, step: int, message: str = "") -> None:
    """Writes status.json; `message` is one line that says why, where there is a why."""
    assert status in STATES, status
    write_json(folder / "status.json", {"status": status, "step": step, "message": message})


def read_status(folder: Path) -> str:
    """Returns the run's state; `planned` without one, `interrupted` if its process is gone.

    A result decides: a run that has one is finished, whatever status.json says.
    """
    with contextlib.suppress(UserError):
        result = read_result(folder)
        if result is not None:
            return result["status"]
    status = (read_json(folder / "status.json") or {}).get("status", "planned")
    if status == "running" and not is_locked(folder):
        return "interrupted"
    return status


@contextlib.contextmanager
def failure_noted(folder: Path) -> Iterator[None]:
    """Leaves `interrupted` or `failed`, and why, in status.json if the block ends badly."""
    try:
        yield
    except BaseException as error:
        by_signal = getattr(error, "exit_code", 0) > 128 or isinstance(error, KeyboardInterrupt)
        status = "interrupted" if by_signal else "failed"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        step = (last_timing(folder) or {"step": 0}).get("step", 0)
        with contextlib.suppress(OSError):  # a full disk is the very thing being reported
            write_status(folder, status, int(step), reason)
        raise


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Writes normlab's log messages of the block to `path`, appending, without a clock."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    if threading.current_thread() is not threading.main_thread():  # one of several runs
        handler.addFilter(lambda record, own=threading.get_ident(): record.thread == own)
    logger = logging.getLogger("normlab")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


# The manifest ------------------------------------------------------------------------------------


def git_state() -> tuple[str | None, bool | None]:
    """Returns (commit, has it uncommitted changes) of normlab's own checkout; None outside one."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != here.parent:
            return None, None
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _version(package: str) -> str | None:
    """Returns a package's version, also of a normlab that is run without being installed."""
    if package == "normlab":
        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    """Returns the processor's name as Linux has it; "unknown" elsewhere."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
        if found:
            return found[1].strip()
    return "unknown"


def describe_machine() -> dict[str, Any]:
    """Returns what a run stood on apart from its config: commit, versions, threads, environment."""
    commit, dirty = git_state()
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "python": platform.python_version(),
        "platform": f"{sys.platform}-{platform.machine()}",
        "cpu": f"{len(os.sched_getaffinity(0))} cores, {_cpu_model()}",
        "versions": {name: _version(name) for name in _PACKAGES},
        "threads": threads(),
        "environment": {name: os.environ[name] for name in RECORDED if name in os.environ},
    }
