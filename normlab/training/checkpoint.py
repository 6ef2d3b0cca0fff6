"""Checkpoints: orbax writes them, a SHA-256 manifest beside each proves that they are whole.

    checkpoints/330/state/          what orbax wrote
    checkpoints/330/manifest.json   step, data position, what the run is, digest of every file

A checkpoint is written under another name and renamed when whole, so a folder named by a step is
complete. The library alone restores a flipped bit without a word; here every file is verified
before it is read, a bad one is kept and named in a warning, and the one before it is used.
"""

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from normlab.errors import MachineFault, UserError
from normlab.run import first_difference, free_name, read_json, write_json

_LOG = logging.getLogger(__name__)

_OVERHEAD_BYTES = 256 * 1024  # of a checkpoint's index and manifest


def save(folder: Path, step: int, state: Any, facts: Mapping[str, Any]) -> Path:
    """Writes `state` (a pytree of arrays) as the checkpoint of `step`; returns its folder.

    `facts` go into its manifest: the run's id and the data position.
    """
    final = folder / str(step)
    temporary = folder / f".writing-{step}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    needed = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state))
    if shutil.disk_usage(temporary).free < needed + _OVERHEAD_BYTES:
        raise _full(folder)
    with _one_line_when_full(folder), _checkpointer() as checkpointer:
        checkpointer.save((temporary / "state").resolve(), jax.tree.map(np.asarray, state))
    manifest = {
        "step": step,
        **facts,
        "form": _form(state),
        "files": _digests(temporary / "state"),
    }
    write_json(temporary / "manifest.json", manifest)
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
def _one_line_when_full(folder: Path) -> Iterator[None]:
    """Raises MachineFault; orbax would log tracebacks from each of its threads as well."""
    absl_logger = logging.getLogger("absl")
    disabled, absl_logger.disabled = absl_logger.disabled, True
    try:
        yield
    except Exception as error:
        if "No space left on device" not in str(error):
            raise
        raise _full(folder) from error
    finally:
        absl_logger.disabled = disabled


def _full(folder: Path) -> MachineFault:
    return MachineFault(f"no space left on device for a checkpoint in {folder}")


def steps(folder: Path) -> list[int]:
    """Returns the steps that have a checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def latest(
    folder: Path, like: Any, facts: Mapping[str, Any]
) -> tuple[int, Any, dict[str, Any]] | None:
    """Returns (step, state, manifest) of the newest good checkpoint; None if there is none.

    `like` gives the tree, shapes and dtypes. A bad checkpoint is named in a warning and passed
    over.
    """
    for step in reversed(steps(folder)):
        try:
            return step, *load(folder / str(step), like, facts)
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
    manifest = read_json(path / "manifest.json")
    if manifest is None:
        raise UserError(f"checkpoint {path} has no manifest")
    found = _digests(path / "state")
    for name in sorted(found.keys() | manifest.get("files", {}).keys()):
        if found.get(name) != manifest.get("files", {}).get(name):
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
        with _checkpointer() as checkpointer:
            return checkpointer.restore((path / "state").resolve(), abstract), manifest
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = str(error).split("\n", 1)[0][:200]
        raise UserError(f"checkpoint {path} does not fit this model: {reason}") from error


def keep_newest(folder: Path, count: int | None) -> None:
    """Deletes all but the newest `count` checkpoints; none of them if `count` is None."""
    for step in steps(folder)[:-count] if count else []:
        shutil.rmtree(folder / str(step))


def _form(tree: Any) -> dict[str, str]:
    """Returns {place in the tree: dtype and shape} of every array."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
