"""Data: where bytes come from, which examples make a batch, how images are augmented.

Loading is on first touch, so that `normlab.data.info` stays light.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normlab.data.augmentation import augment
    from normlab.data.draws import dropout_key, step_key
    from normlab.data.images import Encoded, central_part, prefetched, random_part
    from normlab.data.info import DATASETS, DatasetInfo, binary, dataset_info
    from normlab.data.pipeline import (
        Arranged,
        Examples,
        augmentation_hash,
        epoch_permutation,
        eval_indices,
        fetch,
        order_hash,
        pixels_of,
        train_indices,
        training_batch,
    )
    from normlab.data.sources import (
        AnySplit,
        Dataset,
        Split,
        binarized,
        check_cropping,
        check_mixing,
        check_source,
        describe,
        evaluated,
        hold_out,
        load,
    )

_HOMES = {
    "augmentation": ("augment",),
    "draws": ("dropout_key", "step_key"),
    "info": ("DATASETS", "DatasetInfo", "binary", "dataset_info"),
    "pipeline": (
        "Arranged",
        "Examples",
        "augmentation_hash",
        "epoch_permutation",
        "eval_indices",
        "fetch",
        "order_hash",
        "pixels_of",
        "train_indices",
        "training_batch",
    ),
    "images": ("Encoded", "central_part", "prefetched", "random_part"),
    "sources": (
        "AnySplit",
        "Dataset",
        "Split",
        "binarized",
        "check_cropping",
        "check_mixing",
        "check_source",
        "describe",
        "evaluated",
        "hold_out",
        "load",
    ),
}

__all__ = [
    "DATASETS",
    "AnySplit",
    "Arranged",
    "Dataset",
    "DatasetInfo",
    "Encoded",
    "Examples",
    "Split",
    "augment",
    "augmentation_hash",
    "binarized",
    "binary",
    "central_part",
    "check_cropping",
    "check_mixing",
    "check_source",
    "dataset_info",
    "describe",
    "dropout_key",
    "epoch_permutation",
    "eval_indices",
    "evaluated",
    "fetch",
    "hold_out",
    "load",
    "order_hash",
    "pixels_of",
    "prefetched",
    "random_part",
    "step_key",
    "train_indices",
    "training_batch",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"normlab.data.{home}"), name)
    raise AttributeError(f"module 'normlab.data' has no attribute {name!r}")
