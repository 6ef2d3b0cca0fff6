"""The official files in miniature: the real formats, a few examples of a few pixels."""

import gzip
import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs import base
from normlab.data import DatasetInfo

# Height and width differ, so that a mistaken order of axes shows.
INFOS = {
    name: DatasetInfo(name, shape, classes, train, test, (), (0.5,) * shape[2], (0.25,) * shape[2])
    for name, shape, classes, train, test in (
        ("cifar10", (2, 4, 3), 10, 10, 5),
        ("cifar100", (2, 4, 3), 100, 6, 3),
        ("mnist", (3, 5, 1), 10, 6, 4),
        ("fashion_mnist", (3, 5, 1), 10, 6, 4),
    )
}
Config = Callable[..., ConfigDict]  # of the fixture `archive`
Splits = dict[str, tuple[np.ndarray, np.ndarray]]


def data_config(**fields: Any) -> ConfigDict:
    """Returns the base config's `data` with other values for some fields."""
    config = base.get_config().data
    config.update(fields)
    return config


def splits(name: str) -> Splits:
    """Returns images [N, H, W, C] and labels of both splits, from a fixed stream."""
    info, draw = INFOS[name], np.random.default_rng(0)
    return {
        split: (
            draw.integers(0, 256, (count, *info.image_shape), np.uint8),
            draw.integers(0, info.num_classes, count, np.uint8),
        )
        for split, count in (("train", info.num_train), ("test", info.num_test))
    }


def cifar(name: str, version: str, pickler: Any = None) -> dict[str, bytes]:
    """Returns the files of CIFAR by name; `pickler` turns a dict into bytes."""
    files = {}
    for split, (images, labels) in splits(name).items():
        planar = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        parts = 5 if (name, split) == ("cifar10", "train") else 1
        for part in range(parts):
            rows = slice(part * len(images) // parts, (part + 1) * len(images) // parts)
            if name == "cifar100":
                stem = split
            else:
                stem = f"data_batch_{part + 1}" if split == "train" else "test_batch"
            if version == "binary":
                files[f"{stem}.bin"] = _binary_records(name, planar[rows], labels[rows])
            else:
                files[stem] = pickler(_batch(name, planar[rows], labels[rows]))
    return files


def _binary_records(name: str, planar: np.ndarray, labels: np.ndarray) -> bytes:
    coarse = [labels // 5] if name == "cifar100" else []
    return np.column_stack([*coarse, labels, planar]).astype(np.uint8).tobytes()


def _batch(name: str, planar: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    batch = {"data": planar, "filenames": [f"{i}.png" for i in range(len(labels))]}
    if name == "cifar100":
        batch["coarse_labels"] = [int(label) // 5 for label in labels]
        return batch | {"fine_labels": [int(label) for label in labels]}
    return batch | {"batch_label": "batch 1 of 5", "labels": [int(label) for label in labels]}


def idx(name: str) -> dict[str, bytes]:
    """Returns the four files of MNIST by name, unzipped."""
    files = {}
    for split, (images, labels) in splits(name).items():
        stem = "train" if split == "train" else "t10k"
        count, height, width, _ = images.shape
        header = struct.pack(">4i", 2051, count, height, width)
        files[f"{stem}-images-idx3-ubyte"] = header + images.tobytes()
        files[f"{stem}-labels-idx1-ubyte"] = struct.pack(">2i", 2049, count) + labels.tobytes()
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Writes the files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    """Writes a tar of the files, gzipped unless called .tar; last first, as order is free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as tar:
        for name, content in reversed(files.items()):
            member = tarfile.TarInfo(f"folder/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def gzipped(files: dict[str, bytes]) -> dict[str, bytes]:
    """Returns the files as .gz."""
    return {f"{name}.gz": gzip.compress(content) for name, content in files.items()}


def dotted(files: dict[str, bytes]) -> dict[str, bytes]:
    """Returns the files in the other spelling of idx."""
    return {name.replace("-idx", ".idx"): content for name, content in files.items()}


def python2_pickle(value: Any) -> bytes:
    """Returns the pickle that Python 2 and its numpy wrote: byte strings and old module names."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        return (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
            + b"(K\x01("
            + b"".join(_python2(length) for length in value.shape)
            + b"tcnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
            + b"(K\x03U\x01|NNN"
            + _python2(-1)
            + _python2(-1)
            + b"K\x00tb\x89"
            + _python2(value.tobytes())
            + b"tb"
        )
    if isinstance(value, dict):
        return b"}(" + b"".join(_python2(k) + _python2(v) for k, v in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2, value)) + b"e"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    content = value.encode() if isinstance(value, str) else value
    return b"T" + struct.pack("<i", len(content)) + content
