"""Checkpoints: orbax writes them, a SHA-256 manifest beside each proves that they are whole.

    checkpoints/330/state/          what orbax wrote
    checkpoints/330/manifest.json   step, data position, what the run is, digest of every file and
                                    of itself

A checkpoint is written under another name and renamed when whole, so a folder named by a step is
complete. The library alone restores a flipped bit without a word; here every file is verified
before it is read, a bad one is kept and named in a warning, and the one before it is used.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from normlab.errors import MachineFault, UserError
from normlab.run import first_difference, free_name, read_json, write_json

_LOG = logging.getLogger(__name__)

FORMAT = 1
"""Of the manifest. Those before it had no format and no digest of their own; they are read, too."""

_OVERHEAD_BYTES = 256 * 1024  # of a checkpoint's index and manifest


_ONE_AT_A_TIME = threading.Lock()
"""Orbax mixes up what several threads of a process write or read at once."""


def save(folder: Path, step: int, state: Any, facts: Mapping[str, Any]) -> Path:
    """Writes `state` (a pytree of arrays) as the checkpoint of `step`; returns its folder.

    `facts` go into its manifest: the run's id and the data position. Raises MachineFault, and
    leaves nothing, if the disk takes no more.
    """
    final = folder / str(step)
    temporary = folder / f"{_UNFINISHED}{step}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    with _one_line_for_the_disk(folder, temporary):
        temporary.mkdir(parents=True)
        needed = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state))
        if shutil.disk_usage(temporary).free < needed + _OVERHEAD_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with _ONE_AT_A_TIME, _checkpointer() as checkpointer:
            checkpointer.save((temporary / "state").resolve(), jax.tree.map(np.asarray, state))
        manifest = {
            "format": FORMAT,
            "step": step,
            **facts,
            "form": _form(state),
            "files": _digests(temporary / "state"),
        }
        write_json(temporary / "manifest.json", manifest | {"digest": _own_digest(manifest)})
        if final.exists():  # a bad checkpoint of the same step, passed over when the run resumed
            final.rename(free_name(folder / f"bad-{step}"))
        temporary.rename(final)
    return final


def _checkpointer() -> Any:
    """Returns orbax's checkpointer, of this process alone where there are several."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.StandardCheckpointer()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix="normlab",
    )
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


@contextlib.contextmanager
def _one_line_for_the_disk(folder: Path, temporary: Path) -> Iterator[None]:
    """Raises MachineFault for what the disk refuses; orbax would log each thread's traceback, too.

    What was written by then goes: on a full disk it would take the room that is to be made.
    """
    absl_logger = logging.getLogger("absl")
    disabled, absl_logger.disabled = absl_logger.disabled, True
    try:
        yield
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reasons = [reason for reason in _REFUSALS if reason in str(error)]
        if not reasons:
            raise
        raise MachineFault(f"{reasons[0].lower()} for a checkpoint in {folder}") from error
    finally:
        absl_logger.disabled = disabled


_REFUSALS = tuple(
    os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
)
_UNFINISHED = ".writing-"


def discard_unfinished(folder: Path) -> None:
    """Deletes what killed processes had begun to write; for the holder of the run's lock."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def steps(folder: Path) -> list[int]:
    """Returns the steps that have a checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def latest(
    folder: Path,
    like: Any,
    facts: Mapping[str, Any],
    fault: Callable[[Mapping[str, Any]], str | None] = lambda manifest: None,
) -> tuple[int, Any, dict[str, Any]] | None:
    """Returns (step, state, manifest) of the newest good checkpoint; None if there is none.

    `like` gives the tree, shapes and dtypes; `fault` says of a manifest why a run cannot go on from
    there. A bad checkpoint is named in a warning and passed over.
    """
    for step in reversed(steps(folder)):
        try:
            state, manifest = load(folder / str(step), like, facts)
            if reason := fault(manifest):
                raise UserError(f"checkpoint {folder / str(step)} is of no use: {reason}")
            return step, state, manifest
        except UserError as error:
            _LOG.warning("%s; using the one before it", error)
    return None


def load(
    path: Path, like: Any, facts: Mapping[str, Any] | None = None
) -> tuple[Any, dict[str, Any]]:
    """Returns (state in the form of `like`, manifest) of the checkpoint `path`, verified.

    Raises UserError, one line, if a file is missing, added or altered, if a fact differs from
    `facts`, or if the state has another form.
    """
    manifest = _manifest(path)
    found = _digests(path / "state")
    for name in sorted(found.keys() | manifest["files"].keys()):
        if found.get(name) != manifest["files"].get(name):
            raise UserError(
                f"checkpoint {path} is damaged: {name} is not the file that was written"
            )
    for key, value in (facts or {}).items():
        if manifest.get(key) != value:
            raise UserError(f"checkpoint {path} is of another run: {key} is {manifest.get(key)!r}")
    # Orbax cuts or pads an array of another shape to the one asked for, without a word.
    name, there, here = first_difference(manifest["form"], _form(like)) or ("", "", "")
    if name:
        raise UserError(
            f"checkpoint {path} does not fit this model: {name} is {there} there and {here} here"
        )
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
    try:
        with _ONE_AT_A_TIME, _checkpointer() as checkpointer:
            return checkpointer.restore((path / "state").resolve(), abstract), manifest
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = str(error).split("\n", 1)[0][:200]
        raise UserError(f"checkpoint {path} does not fit this model: {reason}") from error


def _manifest(path: Path) -> dict[str, Any]:
    """Returns the manifest of the checkpoint `path`; raises UserError if it is not as written."""
    manifest = read_json(path / "manifest.json")
    if manifest is None:
        raise UserError(f"checkpoint {path} has no manifest")
    digest, form = manifest.pop("digest", None), manifest.get("format")
    if isinstance(form, int) and form > FORMAT:
        raise UserError(
            f"checkpoint {path} has format {form}, this normlab reads up to {FORMAT}; "
            "use the normlab that wrote it, or a later one"
        )
    before_formats = digest is None and form is None
    whole = before_formats or digest == _own_digest(manifest)
    if not whole or not all(isinstance(manifest.get(name), dict) for name in ("files", "form")):
        raise UserError(f"checkpoint {path} is damaged: its manifest is not what was written")
    return manifest


def _own_digest(manifest: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a manifest's canonical JSON."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def keep_newest(folder: Path, count: int | None) -> None:
    """Deletes all but the newest `count` checkpoints; none of them if `count` is None."""
    for step in steps(folder)[:-count] if count else []:
        shutil.rmtree(folder / str(step))


def _form(tree: Any) -> dict[str, str]:
    """Returns {place in the tree: dtype and shape} of every array."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(
                    file, "sha256"
                ).hexdigest()
    return found
