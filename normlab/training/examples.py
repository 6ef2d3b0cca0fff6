"""A run's data where its steps find it: whole, as uint8, on every device."""

import dataclasses
from collections.abc import Mapping

from jax.sharding import Mesh
from ml_collections import ConfigDict

from normlab.data import Examples, binarized, hold_out, load
from normlab.training import parallel


@dataclasses.dataclass(frozen=True)
class DeviceData:
    """The examples that a run trains on, and those it is evaluated on, by split."""

    train: Examples
    evaluated: Mapping[str, Examples]  # "validation", if any are held out, and "test"
    fingerprint: str  # of the whole data set


def load_on_devices(config: ConfigDict, mesh: Mesh) -> DeviceData:
    """Reads `config.data`; raises UserError, one line, as `data.load` does."""
    data = load(config.data)
    train, validation = hold_out(data.train, config.data.num_validation)
    splits = {"train": train, "validation": validation, "test": data.test}
    placed = {}
    for name, split in splits.items():
        if split is not None:
            split = binarized(split) if config.data.binarize else split
            placed[name] = parallel.replicate((split.images, split.labels), mesh)
    return DeviceData(placed.pop("train"), placed, data.fingerprint)
