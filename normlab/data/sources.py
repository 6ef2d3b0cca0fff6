"""Where bytes come from: one interface, chosen by `config.data.source`. Nothing is downloaded."""

import dataclasses
import hashlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from normlab.data import archive, folder, tfds
from normlab.data.images import INTERPOLATIONS, Encoded
from normlab.data.info import (
    DATASETS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    DatasetInfo,
    binary,
    dataset_info,
)
from normlab.data.pipeline import epoch_permutation
from normlab.errors import UserError, unknown

Files = list[tuple[str, int]]  # (name, bytes)
SMALLEST_CROP = 1e-4  # of an image's area: one of 100 × 100 pixels
HOLD_OUT_SEED = 2**32  # beyond the seeds of runs, so that no epoch's order is the split's


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples in memory."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, chosen: np.ndarray) -> "Split":
        """Returns the examples that are true in `chosen`, bool [N], in their order."""
        return Split(self.images[chosen], self.labels[chosen])


AnySplit = Split | Encoded


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set: in memory if its images are of one size, else encoded."""

    train: AnySplit
    test: AnySplit
    info: DatasetInfo
    fingerprint: str  # SHA-256 of name and examples: the same whatever files they came from;
    # of encoded images, of the names and sizes of their files


def describe(config: Any) -> DatasetInfo:
    """Returns the facts of the data set that `config.data` describes, as the model gets it.

    From what normlab knows by name; of a folder or a directory of tensorflow-datasets, from a cheap
    look at it, if `path` is set. Raises UserError, one line, for an unknown name or source and for
    fields that do not fit.
    """
    if config.source not in SOURCES:
        raise unknown("'data.source'", config.source, SOURCES)
    info = SOURCES[config.source].describe(config)
    if info.one_size:
        for name in ("image_size", "eval_image_size"):
            if config[name] is not None:
                raise UserError(
                    f"config field 'data.{name}' = {config[name]}: the images of "
                    f"{info.name!r} have a size of their own, {info.image_shape[0]} pixels"
                )
    elif config.binarize:
        raise UserError(f"config field 'data.binarize' = true: {info.name!r} is not in memory")
    return binary(info) if config.binarize else info


def evaluated(info: DatasetInfo, config: Any) -> DatasetInfo:
    """Returns the facts of a data set at the size that its images are evaluated at."""
    size = config.eval_image_size
    shape = info.image_shape if size is None else (size, size, info.image_shape[-1])
    return dataclasses.replace(info, image_shape=shape)


def check_cropping(config: Any) -> None:
    """Raises UserError for fields of `config.data` about cropping that are none."""
    low, high = (*config.crop_area, 0.0, 0.0)[:2]
    if len(config.crop_area) != 2 or not SMALLEST_CROP <= low <= high:
        raise UserError(
            f"config field 'data.crop_area' = {config.crop_area} must be two parts of an image's "
            f"area, {SMALLEST_CROP} or more, the smaller one first"
        )
    if config.interpolation not in INTERPOLATIONS:
        raise unknown("'data.interpolation'", config.interpolation, INTERPOLATIONS)


def check_mixing(config: Any) -> None:
    """Raises UserError for fields of `config.data` about MixUp, CutMix and RandAugment."""
    for name in ("mixup_alpha", "cutmix_alpha"):
        if config[name] is not None and config[name] <= 0:
            raise UserError(f"config field 'data.{name}' = {config[name]} must be above 0")
    both = config.mixup_alpha is not None and config.cutmix_alpha is not None
    if both and config.mixup_share + config.cutmix_share > 1:
        raise UserError(
            f"config fields 'data.mixup_share' = {config.mixup_share} and 'data.cutmix_share' = "
            f"{config.cutmix_share} are more than the batch; e.g. 0.5 each"
        )
    if config.randaugment_layers and config.binarize:
        raise UserError(
            f"config field 'data.randaugment_layers' = {config.randaugment_layers}: pixels of "
            "'data.binarize' = true would not stay 0 and 1"
        )


def check_source(config: Any) -> None:
    """Raises UserError if `config.data` cannot be loaded, as far as a cheap look can tell."""
    describe(config)
    SOURCES[config.source].check(config)


def load(config: Any) -> Dataset:
    """Returns the data set that `config.data` describes.

    Raises UserError, one line, for a source or file that is missing, damaged or another data set's.
    """
    check_source(config)
    info = describe(config)
    train, test, files = SOURCES[config.source].read(config, info)
    for what, split, count in (("train", train, info.num_train), ("test", test, info.num_test)):
        if len(split) != count:
            raise UserError(
                f"data set {info.name!r} has {len(split):,} {what} images, not {count:,}"
            )
        if isinstance(split, Split):
            _check(info, what, split)
    fingerprint = _fingerprint(info.name, train, test, files)
    if config.binarize and isinstance(train, Split) and isinstance(test, Split):
        train, test = binarized(train), binarized(test)
    return Dataset(train, test, info, fingerprint)


def _check(info: DatasetInfo, what: str, split: Split) -> None:
    if split.images.shape[1:] != info.image_shape:
        raise UserError(
            f"data set {info.name!r}: the {what} images have shape {split.images.shape}, "
            f"not {(len(split), *info.image_shape)}"
        )
    for label in (int(split.labels.min()), int(split.labels.max())):
        if not 0 <= label < info.num_classes:
            raise UserError(
                f"data set {info.name!r}: {what} label {label} is not one from 0 to "
                f"{info.num_classes - 1}"
            )


def binarized(split: Split) -> Split:
    """Returns the images with every pixel below 128 as 0 and the others as 255."""
    return Split(np.where(split.images < 128, np.uint8(0), np.uint8(255)), split.labels)


def hold_out(train: AnySplit, count: int) -> tuple[AnySplit, AnySplit | None]:
    """Returns (what is left to train on, `count` validation examples or None if 0).

    Which ones depends on the number of examples and on nothing else, the run's seed included: all
    runs of a sweep choose on the same images.
    """
    if count == 0:
        return train, None
    order = epoch_permutation(HOLD_OUT_SEED, 0, len(train))
    chosen = np.isin(np.arange(len(order)), order[:count])
    return train.select(~chosen), train.select(chosen)


def _fingerprint(name: str, train: AnySplit, test: AnySplit, files: Files) -> str:
    digest = hashlib.sha256(os.fsencode(name))
    for split in (train, test):
        if isinstance(split, Split):
            digest.update(np.ascontiguousarray(split.images).data)
            digest.update(split.labels.astype("<i4").data)
    if isinstance(train, Encoded):
        for file, size in files:
            digest.update(os.fsencode(f"{file} {size}\n"))
    return digest.hexdigest()


# Sources -----------------------------------------------------------------------------------------

Read = tuple[AnySplit, AnySplit, Files]  # train, test, and the files they come from if encoded


@dataclasses.dataclass(frozen=True)
class Source:
    """A way to get the data set that `config.data` names; each raises UserError, one line."""

    describe: Callable[[Any], DatasetInfo]  # its facts, without reading an image
    check: Callable[[Any], None]  # can it be read, as far as a cheap look can tell
    read: Callable[[Any, DatasetInfo], Read]


def _by_name(config: Any) -> DatasetInfo:
    return dataset_info(config.name)


def _check_sklearn(config: Any) -> None:
    if config.name != "digits":
        raise UserError(
            f"data set {config.name!r} does not come with scikit-learn; "
            "use --config.data.source=archive --config.data.path=FOLDER"
        )
    if config.path is not None:
        raise UserError(
            f"config field 'data.path' = {config.path!r}: source 'sklearn' reads no file"
        )


def _read_sklearn(config: Any, info: DatasetInfo) -> Read:
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
    whole = Split(images, labels.astype(np.int32))
    return whole.select(~held_out), whole.select(held_out), []


def _check_archive(config: Any) -> None:
    archive.find(dataset_info(config.name), config.path)


def _read_archive(config: Any, info: DatasetInfo) -> Read:
    train, test = archive.read(info, archive.find(info, config.path))
    return Split(*train), Split(*test), []


def _describe_folder(config: Any) -> DatasetInfo:
    if config.path is None:
        return _described(config, None, None)
    train, test = folder.find(config.path)
    return _described(config, (len(train.files), len(test.files)), train.class_names)


def _check_folder(config: Any) -> None:
    folder.find(config.path)


def _read_folder(config: Any, info: DatasetInfo) -> Read:
    train, test = folder.find(config.path)
    files = [] if info.one_size else train.sizes() + test.sizes()
    return *_in_memory(info, train.encoded(), test.encoded()), files


def _describe_tfds(config: Any) -> DatasetInfo:
    if config.path is None:
        return _described(config, None, None)
    found = tfds.find(config.name, config.path)
    return _described(config, found.counts, found.class_names)


def _check_tfds(config: Any) -> None:
    tfds.find(config.name, config.path)


def _read_tfds(config: Any, info: DatasetInfo) -> Read:
    found = tfds.find(config.name, config.path)
    return *_in_memory(info, *found.encoded()), found.files()


def _in_memory(info: DatasetInfo, train: Encoded, test: Encoded) -> tuple[AnySplit, AnySplit]:
    """Returns the images decoded if they are of one size, else as they are.

    Either way a label that is of no class is refused where it is read.
    """
    classes = info.num_classes
    train, test = (dataclasses.replace(split, num_classes=classes) for split in (train, test))
    if not info.one_size:
        return train, test
    return Split(*train.whole(info.image_shape)), Split(*test.whole(info.image_shape))


def _described(
    config: Any, counts: tuple[int, int] | None, class_names: tuple[str, ...] | None
) -> DatasetInfo:
    """Returns the facts of a data set that `counts` and `class_names` were seen of, if it was seen.

    A name that normlab does not know is a data set of images of any size.
    """
    known = DATASETS.get(config.name)
    if counts is None or class_names is None:
        known = dataset_info(config.name)
        counts, class_names = (known.num_train, known.num_test), known.class_names
    if known is not None and known.class_names and class_names not in ((), known.class_names):
        stranger = min(set(class_names) ^ set(known.class_names), default="order")
        raise UserError(
            f"config field 'data.path' = {config.path!r} holds other classes than {known.name!r}: "
            f"{stranger!r}"
        )
    num_classes = len(class_names) or (known.num_classes if known else 0)
    if known is not None and num_classes != known.num_classes:
        raise UserError(
            f"config field 'data.path' = {config.path!r} holds {num_classes} classes, "
            f"{known.name!r} has {known.num_classes}"
        )
    if known is not None and known.one_size:
        return known
    if not num_classes:
        raise UserError(f"data set {config.name!r} does not say how many classes it has")
    size = config.image_size if config.image_size is not None else 224
    return DatasetInfo(
        name=config.name,
        image_shape=(size, size, 3),
        num_classes=num_classes,
        num_train=counts[0],
        num_test=counts[1],
        class_names=class_names,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        one_size=False,
    )


SOURCES = {
    "sklearn": Source(_by_name, _check_sklearn, _read_sklearn),
    "archive": Source(_by_name, _check_archive, _read_archive),
    "tfds": Source(_describe_tfds, _check_tfds, _read_tfds),
    "folder": Source(_describe_folder, _check_folder, _read_folder),
}
"""Sources by config name."""
