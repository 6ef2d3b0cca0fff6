"""From the bytes of the official files to arrays: CIFAR's two formats and MNIST's idx.

Each form knows the size that a file must have, so that nobody reads further than that, and checks
what it decodes. Nothing here touches the disk.
"""

import hashlib
import io
import math
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from normlab.data.info import DatasetInfo
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
        batch = load_pickle(file)
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


def load_pickle(file: File) -> dict[Any, Any]:
    """Returns the dict in a pickle of uint8 arrays and plain containers.

    Strings of Python 2 become bytes. Raises UserError for a pickle that is cut off or that wants
    anything else, which is then not called.
    """
    try:
        _check_memo(file.content)
        batch = _SafeUnpickler(io.BytesIO(file.content), encoding="bytes").load()
    except Exception as error:  # damaged or hostile bytes may raise anything
        size = len(file.content)
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"file {file.label!r} ({size:,} bytes) is no pickle of arrays: {reason}"
        ) from error
    if not isinstance(batch, dict):
        raise UserError(f"file {file.label!r} is a pickled {type(batch).__name__}, not a dict")
    return _arrays_in(batch)


def _check_memo(content: bytes) -> None:
    """Raises UnpicklingError for a memo index past the number of opcodes before it.

    Picklers count memo entries up. The unpickler clears a table of twice the index, whatever the
    size of the file: gigabytes for nine bytes.
    """
    for ordinal, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > ordinal:
            raise pickle.UnpicklingError(f"it has memo index {argument} at opcode {ordinal}")


class _SafeUnpickler(pickle.Unpickler):
    """Puts stand-ins of ours in the place of all that a numpy array wants, and admits nothing else.

    numpy's own constructors would take lengths and types from the file on trust.
    """

    def find_class(self, module: str, name: str) -> Any:
        stand_in = _STAND_INS.get((module, name))
        if stand_in is None:
            raise pickle.UnpicklingError(f"it wants {module}.{name}")
        return stand_in


class _PickledArray:
    """What the file says of an array, until it is checked."""

    array: np.ndarray | None = None

    def __init__(self, *_: Any) -> None:
        """Ignores the arguments of numpy's `_reconstruct`: the array's class and a first shape."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, column_major, content = state
        if not isinstance(dtype, _PickledDtype) or dtype.code not in ("u1", b"u1"):
            raise pickle.UnpicklingError("it has an array that is not uint8")
        flat = np.frombuffer(content, np.uint8)
        self.array = flat.reshape(shape, order="F" if column_major else "C")


class _PickledDtype:
    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Ignores byte order and alignment, of which uint8 has none."""


def _encode(text: str, encoding: str) -> bytes:
    """Stands in for `_codecs.encode`, by which Python 3 writes bytes in an old protocol."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"it has text in encoding {encoding!r}")
    return text.encode("latin1")


_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy", "ndarray"): "ndarray",  # only ever an argument of _reconstruct
    ("numpy", "dtype"): _PickledDtype,
    ("_codecs", "encode"): _encode,
}


def _arrays_in(batch: dict[Any, Any]) -> dict[Any, Any]:
    return {k: v.array if isinstance(v, _PickledArray) else v for k, v in batch.items()}


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
