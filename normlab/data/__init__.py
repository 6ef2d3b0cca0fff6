"""Data: where bytes come from, which examples make a batch, how images are augmented.

Loading is on first touch, so that `normlab.data.info` stays light.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normlab.data.augmentation import augment
    from normlab.data.info import DATASETS, DatasetInfo, binary, dataset_info
    from normlab.data.pipeline import (
        Examples,
        epoch_permutation,
        eval_indices,
        fetch,
        order_hash,
        step_key,
        train_indices,
    )
    from normlab.data.sources import Dataset, Split, binarized, check_source, hold_out, load

_HOMES = {
    "augmentation": ("augment",),
    "info": ("DATASETS", "DatasetInfo", "binary", "dataset_info"),
    "pipeline": (
        "Examples",
        "epoch_permutation",
        "eval_indices",
        "fetch",
        "order_hash",
        "step_key",
        "train_indices",
    ),
    "sources": ("Dataset", "Split", "binarized", "check_source", "hold_out", "load"),
}

__all__ = [
    "DATASETS",
    "Dataset",
    "DatasetInfo",
    "Examples",
    "Split",
    "augment",
    "binarized",
    "binary",
    "check_source",
    "dataset_info",
    "epoch_permutation",
    "eval_indices",
    "fetch",
    "hold_out",
    "load",
    "order_hash",
    "step_key",
    "train_indices",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"normlab.data.{home}"), name)
    raise AttributeError(f"module 'normlab.data' has no attribute {name!r}")
