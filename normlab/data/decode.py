"""From the bytes of the official files to arrays: CIFAR's two formats and MNIST's idx.

Each form knows the size that a file must have, so that nobody reads further than that, and checks
what it decodes. Nothing here touches the disk.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from normlab.data.info import DatasetInfo
from normlab.data.pickles import load_arrays
from normlab.errors import UserError

Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 [N, H, W, C], labels int32 [N]


class File(NamedTuple):
    """The bytes of a file and what to call it in an error."""

    label: str
    content: bytes


class Form(NamedTuple):
    """A file format: its sizes and its decoder.

    `sizes(info, count, files)` gives the bytes of each of the `files` files of a split of `count`
    examples: the number, or if not `exact` the most that it can be. `decode(info, files, count)`
    gives the split's arrays; it raises UserError, one line, for bytes that are not such a split.
    """

    exact: bool
    sizes: Callable[[DatasetInfo, int, int], list[int]]
    decode: Callable[[DatasetInfo, list[File], int], Arrays]


# CIFAR, binary: a record is label bytes (CIFAR-100: coarse, fine), then a plane for each channel.


def _binary_sizes(info: DatasetInfo, count: int, files: int) -> list[int]:
    return [count // files * (_label_bytes(info) + math.prod(info.image_shape))] * files


def _decode_binary(info: DatasetInfo, files: list[File], count: int) -> Arrays:
    first_pixel = _label_bytes(info)
    content = b"".join(file.content for file in files)
    records = np.frombuffer(content, np.uint8).reshape(count, -1)
    labels = records[:, first_pixel - 1].astype(np.int32)
    return _planes_last(records[:, first_pixel:], info), labels


COARSE_CLASSES = 20  # of CIFAR-100


def wrong_label(info: DatasetInfo, content: bytes) -> str:
    """Returns what is wrong with the labels in a file of whole binary records, "" if nothing is."""
    first_pixel = _label_bytes(info)
    records = np.frombuffer(content, np.uint8).reshape(
        -1, first_pixel + math.prod(info.image_shape)
    )
    tops = [info.num_classes] if first_pixel == 1 else [COARSE_CLASSES, info.num_classes]
    for column, top in enumerate(tops):
        wrong = np.flatnonzero(records[:, column] >= top)
        if len(wrong):
            label = records[wrong[0], column]
            kind = "coarse label" if len(tops) > column + 1 else "label"
            return f"record {wrong[0]} has {kind} {label}, not one from 0 to {top - 1}"
    return ""


def _label_bytes(info: DatasetInfo) -> int:
    return 2 if info.name == "cifar100" else 1


def _planes_last(planar: np.ndarray, info: DatasetInfo) -> np.ndarray:
    """Returns planar rows [N, C·H·W] as images [N, H, W, C]."""
    height, width, channels = info.image_shape
    images = planar.reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images)


# CIFAR, python: a pickled dict of `data` uint8 [N, C·H·W] and a list `labels` or `fine_labels`.


def _python_sizes(info: DatasetInfo, count: int, files: int) -> list[int]:
    # 200 bytes are room for an example's labels and file name (about 30 in the official files).
    return [count // files * (math.prod(info.image_shape) + 200) + 10_000] * files


def _decode_python(info: DatasetInfo, files: list[File], count: int) -> Arrays:
    key = "fine_labels" if info.name == "cifar100" else "labels"
    shape = (count // len(files), math.prod(info.image_shape))
    pixels, labels = [], []
    for file in files:
        batch = load_arrays(file.content, file.label, ("u1",))
        found = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in batch.items()}
        data, classes = found.get("data"), found.get(key)
        if not isinstance(data, np.ndarray) or data.shape != shape:
            raise UserError(f"file {file.label!r} has no uint8 array 'data' of shape {shape}")
        if not _is_labels(classes, shape[0], info.num_classes):
            raise UserError(
                f"file {file.label!r} has no list {key!r} of {shape[0]} labels "
                f"from 0 to {info.num_classes - 1}"
            )
        pixels.append(data)
        labels.append(np.array(classes, np.int32))
    return _planes_last(np.concatenate(pixels), info), np.concatenate(labels)


def _is_labels(found: Any, count: int, num_classes: int) -> bool:
    if not isinstance(found, list) or len(found) != count:
        return False
    return all(isinstance(label, int) and 0 <= label < num_classes for label in found)


# idx: big-endian magic (0x08: uint8, then the number of axes), the axes' lengths, the bytes.

# MD5 of the label files, unpacked. The two sets have the same file names and sizes.
_LABELS_MD5 = {
    "a25bea736e30d166cdddb491f175f624": "mnist",
    "27ae3e4e09519cfbb04c329615203637": "mnist",
    "9018921c3c673c538a1fc5bad174d6f9": "fashion_mnist",
    "15d484375f8d13e6eb1aabb0c3f46965": "fashion_mnist",
}


def _idx_sizes(info: DatasetInfo, count: int, files: int) -> list[int]:
    return [len(_idx_header(shape)) + math.prod(shape) for shape in _idx_shapes(info, count)]


def _decode_idx(info: DatasetInfo, files: list[File], count: int) -> Arrays:
    labels_md5 = hashlib.md5(files[1].content, usedforsecurity=False).hexdigest()
    owner = _LABELS_MD5.get(labels_md5, info.name)
    if owner != info.name:
        raise UserError(f"file {files[1].label!r} is of {owner!r}, not of {info.name!r}")
    arrays = []
    for file, shape in zip(files, _idx_shapes(info, count), strict=True):
        header = _idx_header(shape)
        if not file.content.startswith(header):
            raise UserError(f"file {file.label!r} has not the header of an idx file of {shape}")
        pixels = np.frombuffer(file.content, np.uint8, offset=len(header))
        arrays.append(pixels.reshape(shape))
    images, labels = arrays
    return images.reshape(count, *info.image_shape), labels.astype(np.int32)


def _idx_shapes(info: DatasetInfo, count: int) -> list[tuple[int, ...]]:
    return [(count, *info.image_shape[:2]), (count,)]


def _idx_header(shape: tuple[int, ...]) -> bytes:
    return np.array([0x0800 + len(shape), *shape], ">i4").tobytes()


CIFAR_BINARY = Form(True, _binary_sizes, _decode_binary)
CIFAR_PYTHON = Form(False, _python_sizes, _decode_python)
IDX = Form(True, _idx_sizes, _decode_idx)
