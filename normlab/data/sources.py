"""Where bytes come from: one interface, chosen by `config.data.source`. Nothing is downloaded."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from normlab.data import archive
from normlab.data.info import DatasetInfo, dataset_info
from normlab.data.pipeline import epoch_permutation
from normlab.errors import UserError, unknown

HOLD_OUT_SEED = 2**32  # beyond the seeds of runs, so that no epoch's order is the split's


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples in memory."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set in memory."""

    train: Split
    test: Split
    info: DatasetInfo
    fingerprint: str  # SHA-256 of name and examples: the same whatever files they came from


def load(config: Any) -> Dataset:
    """Returns the data set that `config.data` (name, source, path) describes.

    Raises UserError, one line, for a source or file that is missing, damaged or another data set's.
    """
    info = dataset_info(config.name)
    check_source(config)
    train, test = SOURCES[config.source].read(info, config.path)
    for what, split, count in (("train", train, info.num_train), ("test", test, info.num_test)):
        if split.images.shape != (count, *info.image_shape):
            raise UserError(
                f"data set {info.name!r}: the {what} images have shape {split.images.shape}, "
                f"not {(count, *info.image_shape)}"
            )
        top = int(split.labels.max())
        if top >= info.num_classes:
            raise UserError(
                f"data set {info.name!r}: {what} label {top} is not below {info.num_classes}"
            )
    return Dataset(train, test, info, _fingerprint(info.name, train, test))


def binarized(split: Split) -> Split:
    """Returns the images with every pixel below 128 as 0 and the others as 255."""
    return Split(np.where(split.images < 128, np.uint8(0), np.uint8(255)), split.labels)


def hold_out(train: Split, count: int) -> tuple[Split, Split | None]:
    """Returns (what is left to train on, `count` validation examples or None if 0).

    Which ones depends on the number of examples and on nothing else, the run's seed included: all
    runs of a sweep choose on the same images.
    """
    if count == 0:
        return train, None
    order = epoch_permutation(HOLD_OUT_SEED, 0, len(train.labels))
    chosen = np.isin(np.arange(len(order)), order[:count])
    left, held = (Split(train.images[part], train.labels[part]) for part in (~chosen, chosen))
    return left, held


def check_source(config: Any) -> None:
    """Raises UserError if `config.data` cannot be loaded, as far as a cheap look can tell."""
    info = dataset_info(config.name)
    if config.source not in SOURCES:
        raise unknown("'data.source'", config.source, SOURCES)
    SOURCES[config.source].check(info, config.path)


def _fingerprint(name: str, train: Split, test: Split) -> str:
    digest = hashlib.sha256(name.encode())
    for split in (train, test):
        digest.update(np.ascontiguousarray(split.images).data)
        digest.update(split.labels.astype("<i4").data)
    return digest.hexdigest()


# Sources -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Source:
    """A way to get data: `check(info, path)` and `read(info, path) -> (train, test)`."""

    check: Callable[[DatasetInfo, str | None], None]
    read: Callable[[DatasetInfo, str | None], tuple[Split, Split]]


def _check_sklearn(info: DatasetInfo, path: str | None) -> None:
    if info.name != "digits":
        raise UserError(
            f"data set {info.name!r} does not come with scikit-learn; "
            "use --config.data.source=archive --config.data.path=FOLDER"
        )
    if path is not None:
        raise UserError(f"config field 'data.path' = {path!r}: source 'sklearn' reads no file")


def _read_sklearn(info: DatasetInfo, path: str | None) -> tuple[Split, Split]:
    """Reads scikit-learn's digits; every fifth one, counted class by class, is a test image.

    The set comes without a split. This one depends on no random stream; writers are not disjoint.
    Pixels 0 .. 16 become round(255 · pixel / 16).
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels.reshape(-1, *info.image_shape) * (255 / 16)).astype(np.uint8)
    by_class = np.argsort(labels, kind="stable")
    held_out = np.zeros(len(labels), bool)
    held_out[by_class[::5]] = True

    def split(chosen: np.ndarray) -> Split:
        return Split(images[chosen], labels[chosen].astype(np.int32))

    return split(~held_out), split(held_out)


def _check_archive(info: DatasetInfo, path: str | None) -> None:
    archive.find(info, path)


def _read_archive(info: DatasetInfo, path: str | None) -> tuple[Split, Split]:
    train, test = archive.read(info, archive.find(info, path))
    return Split(*train), Split(*test)


SOURCES = {
    "sklearn": Source(_check_sklearn, _read_sklearn),
    "archive": Source(_check_archive, _read_archive),
}
"""Sources by config name."""
