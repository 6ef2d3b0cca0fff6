"""What a run writes down before its first step: config, identity, manifest, notes."""

import datetime
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from normlab import run
from normlab.config import to_json
from normlab.data import augmentation_hash
from normlab.environment import determinism
from normlab.errors import UserError
from normlab.models.layers import norm_layers
from normlab.training.setup import Parts, id_of

_LOG = logging.getLogger(__name__)


def init_hashes(params: Any) -> dict[str, str]:
    """Returns {parameter path: "3x3x16x32 " and 12 hex digits of its initial bytes' SHA-256}.

    Two variants of one seed have equal digits for every parameter they share: the proof of pairing.
    """
    flat = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    return {
        name: f"{'x'.join(map(str, array.shape))} {_digits(array)}"
        for name, array in sorted(flat.items())
    }


def _digits(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:12]


def describe_process() -> dict[str, Any]:
    """Returns what a run of this process stands on apart from its config."""
    return run.describe_machine() | {
        "devices": [str(device) for device in jax.devices()],
        "deterministic": determinism(jax.default_backend(), jax.device_count()),
    }


def check_fingerprint(folder: Path, config: ConfigDict, fingerprint: str) -> None:
    """Raises UserError if the run in `folder` was begun with data of another fingerprint.

    Its steps so far would belong to other examples, in another order. Reads the manifest alone.
    """
    manifest = run.read_json(folder / "manifest.json")
    if manifest is None:
        return
    began = manifest.get("data_fingerprint")
    if began != fingerprint:
        raise UserError(
            f"run {str(folder)!r} was made with data of fingerprint {str(began)[:12]}, "
            f"config field 'data.path' = {config.data.path!r} has {fingerprint[:12]}; "
            "choose another folder, or the data of then"
        )


def describe_run(
    parts: Parts,
    folder: Path,
    overrides: Mapping[str, Any],
    data_fingerprint: str,
    data_order_hash: str,
    params: Any,
) -> None:
    """Writes config.json and manifest.json; a resumed run keeps the first ones, if they are whole.

    `params` are the initial ones. What the resuming process stands on goes into `resumed` of the
    manifest, if it differs.
    """
    machine = describe_process()
    manifest = run.read_json(folder / "manifest.json")
    if manifest is not None:
        resumed = manifest.get("resumed", [])
        if not isinstance(resumed, list) or not all(isinstance(then, dict) for then in resumed):
            raise UserError(
                f"{folder / 'manifest.json'} is damaged: 'resumed' is no list of objects"
            )
        earlier = [manifest, *resumed][-1]
        if any(earlier.get(key) != value for key, value in machine.items()):
            manifest["resumed"] = [*resumed, machine]
            run.write_json(folder / "manifest.json", manifest)
        if not _is_readable(folder / "config.json"):
            run.write_json(folder / "config.json", to_json(parts.config))
        return
    run.write_json(folder / "config.json", to_json(parts.config))
    manifest = {
        "schema_version": 1,
        "id": id_of(parts.config),
        "seed": parts.config.seed,
        "num_steps": parts.length.num_steps,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "overrides": [f"{name}={value}" for name, value in overrides.items()],
        **machine,
        "steps_per_epoch": parts.length.steps_per_epoch,
        "data_fingerprint": data_fingerprint,
        "data_order_hash": data_order_hash,
        "augmentation_hash": augmentation_hash(parts.config.seed, parts.config.data),
        "init_hashes": init_hashes(params),
    }
    run.write_json(folder / "manifest.json", manifest)


def _is_readable(path: Path) -> bool:
    try:
        return run.read_json(path) is not None
    except UserError:
        return False


def note_groups(parts: Parts) -> None:
    """Notes in the run's log where a grouping did not divide the channels and was settled."""
    for layer in norm_layers(parts.model, parts.info.image_shape):
        if layer.note:
            _LOG.warning("%s: %s", layer.path, layer.note)
