"""A folder of one checkpoint that no run of this package left as it is, for `normlab eval`.

It has config, manifest and checkpoint, and no identity.json: `normlab train` refuses the folder,
and cannot train on from here under the name of a run that never was.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from normlab import run
from normlab.errors import UserError
from normlab.training import checkpoint
from normlab.training.state import TrainState


def check_new(workdir: Path) -> None:
    """Raises UserError for a folder that exists: nothing is overwritten."""
    if workdir.exists():
        raise UserError(f"workdir {str(workdir)!r} exists; choose a new folder")


def write(
    workdir: Path,
    state: TrainState,
    *,
    config: Mapping[str, Any],
    manifest: Mapping[str, Any],
) -> None:
    """Writes the folder: `config` as config.json, and `manifest`, whose `id` is the run's.

    Raises UserError if it exists or cannot be made.
    """
    check_new(workdir)
    try:
        workdir.mkdir(parents=True)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"workdir {str(workdir)!r} cannot be written: {reason}") from error
    facts = {"run": manifest.get("id"), "seed": config["seed"]}
    checkpoint.save(workdir / "checkpoints", int(state.step), jax.device_get(state), facts)
    run.write_json(workdir / "config.json", dict(config))
    run.write_json(workdir / "manifest.json", dict(manifest))
