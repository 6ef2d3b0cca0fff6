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
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import logging
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
from normlab.files import append_line as append_line
from normlab.files import blocks_of, read_json, write_json
from normlab.files import finite_or_none as finite_or_none
from normlab.files import free_name as free_name
from normlab.files import write_bytes as write_bytes
from normlab.files import write_text as write_text

STATES = ("running", "done", "diverged", "failed", "interrupted")
SWEEP = "sweep.json"
VERDICT = "verdict.json"
_PACKAGES = (
    *("normlab", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml-collections"),
    *("pillow", "scikit-learn", "tensorflow-datasets", "array_record"),  # they decode data
)


# Logs --------------------------------------------------------------------------------------------

LOGS = ("metrics.jsonl", "timing.jsonl")


def log_bytes(folder: Path) -> dict[str, int]:
    """Returns the sizes of the logs, to be kept with a checkpoint."""
    return {name: (folder / name).stat().st_size for name in LOGS if (folder / name).exists()}


def log_mark(folder: Path) -> dict[str, Any]:
    """Returns what a checkpoint keeps of the logs: their sizes, and the SHA-256 of the metrics."""
    sizes = log_bytes(folder)
    digest = _digest_of_start(folder / LOGS[0], sizes.get(LOGS[0], 0))
    return {"log_bytes": sizes, "log_digest": digest}


def log_fault(folder: Path, mark: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with the metrics up to a checkpoint; None if they are as they were.

    `mark` is the checkpoint's, of `log_mark`. One without digest, of an earlier version, is taken
    on trust.
    """
    sizes = mark.get("log_bytes")
    if not isinstance(sizes, dict) or not all(type(size) is int for size in sizes.values()):
        return "its log_bytes are no sizes"
    if "log_digest" not in mark:
        return None
    if mark["log_digest"] == _digest_of_start(folder / LOGS[0], sizes.get(LOGS[0], 0)):
        return None
    return f"{LOGS[0]} up to there is not what was written"


def _digest_of_start(path: Path, size: int) -> str:
    """Returns the SHA-256 of the first `size` bytes of a file, of all of a shorter one."""
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            while piece := file.read(max(min(size, 2**20), 0)):
                digest.update(piece)
                size -= len(piece)
    return digest.hexdigest()


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
    records = []
    for lines in blocks_of(path) if path.is_file() else ():
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
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
    """Returns the numbers of timing.jsonl's last line, none of them negative; {} without one."""
    last = (read_lines(folder / "timing.jsonl") or [{}])[-1]
    return {name: value for name, value in last.items() if _is_amount(value)}


def _is_amount(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value <= sys.float_info.max  # NaN is not, nor an int beyond all floats


def last_train_loss(folder: Path) -> float | None:
    """Returns the training loss of the last line that has one."""
    lines = read_lines(folder / "metrics.jsonl")
    losses = [line.get("loss") for line in lines if line.get("split") == "train"]
    return losses[-1] if losses else None


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
        if error.errno in _NO_ROOM:  # no mistake of the user's
            raise
        reason = os.strerror(error.errno or 0)
        raise UserError(f"workdir {str(folder)!r} cannot be written: {reason}") from error
    for name in (*LOGS, "log.txt"):
        _refuse_link(folder / name)
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


def _refuse_link(path: Path) -> None:
    """Raises UserError for a link: a folder of a stranger would have files outside it written."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"{path} is a link or no file; a run writes only into its own folder")


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


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
    _refuse_link(folder / "lock")
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
    path = folder / "lock"
    if not path.is_file():
        return False
    with contextlib.suppress(FileNotFoundError), path.open() as file:
        return not _try_lock(file)
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


class _QuietHandler(logging.FileHandler):
    """Says nothing where it cannot write: a full disk is reported once, by what it ends."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Writes normlab's log messages of the block to `path`, appending, without a clock."""
    handler = _QuietHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    if threading.current_thread() is not threading.main_thread():  # one of several runs
        own = threading.get_ident()
        handler.addFilter(lambda record: record.thread == own)
    logger = logging.getLogger("normlab")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        if threading.current_thread() is threading.main_thread():
            logger.setLevel(level)
        with contextlib.suppress(OSError):
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
