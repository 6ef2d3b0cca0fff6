"""The official files of CIFAR-10, CIFAR-100, MNIST and Fashion-MNIST, as people have them on disk.

CIFAR: the python or the binary version, as the tar.gz or unpacked. MNIST and Fashion-MNIST: the four
idx files, gzipped or not, in a folder or a tar. `data.path` is the archive, the folder with the
files, or the folder that holds either. Archives are read in memory, member by member; nothing is
written to disk, so no member's name can lead anywhere. No read goes past the size that a file must
have, so a small file that unpacks to a huge one is refused and not unpacked.

Published MD5 sums are checked for the official tar.gz files (by name). Single idx.gz files come in
several compressions of the same bytes (Debian's Fashion-MNIST is one), so of these the size after
unpacking and the header are checked.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from normlab.data.info import DatasetInfo
from normlab.errors import UserError

Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 [N, H, W, C], labels int32 [N]

# From https://www.cs.toronto.edu/~kriz/cifar.html.
PUBLISHED_MD5 = {
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
    "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """One official layout: its folder inside the archive and the files of each split."""

    archive: str  # name of the official archive; "" if there is none
    folder: str  # name of the folder it unpacks to
    form: str  # cifar_python, cifar_binary or idx
    train: tuple[str, ...]
    test: tuple[str, ...]


_IDX_TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
_IDX_TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

LAYOUTS = {
    "cifar10": (
        Layout(
            "cifar-10-python.tar.gz",
            "cifar-10-batches-py",
            "cifar_python",
            tuple(f"data_batch_{i}" for i in range(1, 6)),
            ("test_batch",),
        ),
        Layout(
            "cifar-10-binary.tar.gz",
            "cifar-10-batches-bin",
            "cifar_binary",
            tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            ("test_batch.bin",),
        ),
    ),
    "cifar100": (
        Layout(
            "cifar-100-python.tar.gz", "cifar-100-python", "cifar_python", ("train",), ("test",)
        ),
        Layout(
            "cifar-100-binary.tar.gz",
            "cifar-100-binary",
            "cifar_binary",
            ("train.bin",),
            ("test.bin",),
        ),
    ),
    "mnist": (Layout("mnist.tar.gz", "mnist", "idx", _IDX_TRAIN, _IDX_TEST),),
    "fashion_mnist": (
        Layout("fashion-mnist.tar.gz", "fashion-mnist", "idx", _IDX_TRAIN, _IDX_TEST),
    ),
}


@dataclasses.dataclass(frozen=True)
class Found:
    """Where a layout was found: a folder with its files, or a tar archive."""

    layout: Layout
    path: Path

    @property
    def is_tar(self) -> bool:
        """True for a tar archive, compressed or not."""
        return self.path.is_file()


# Finding -----------------------------------------------------------------------------------------


def find(info: DatasetInfo, path_text: str | None) -> Found:
    """Returns where the files of a data set are; raises UserError, naming what was looked for."""
    layouts = LAYOUTS.get(info.name)
    if layouts is None:
        raise UserError(f"data set {info.name!r} has no archive; use --config.data.source=sklearn")
    if path_text is None:
        wanted = " or ".join(layout.archive or layout.folder for layout in layouts)
        raise UserError(f"config field 'data.path' is not set; it names {wanted}, or their folder")
    path = Path(path_text).expanduser()
    if not path.exists():
        raise UserError(f"config field 'data.path' = {path_text!r} does not exist")
    for layout in layouts:
        found = _find_layout(layout, path)
        if found:
            return found
    wanted = ", ".join(f"{layout.folder}/, {layout.archive}" for layout in layouts)
    other = _other_data_set(path, info.name)
    hint = f"; it holds {other!r}" if other else f"; looked for {wanted}"
    raise UserError(f"config field 'data.path' = {path_text!r} holds no {info.name!r}{hint}")


def _find_layout(layout: Layout, path: Path) -> Found | None:
    if path.is_file():
        stem = layout.archive.removesuffix(".gz").removesuffix(".tar")
        is_it = path.name.startswith(stem) and ".tar" in path.name or path.suffix == ".tgz"
        return Found(layout, path) if is_it and _tar_has(path, layout) else None
    for folder in (path, path / layout.folder):
        if any(_member(folder, name).exists() for name in layout.train):
            return Found(layout, folder)
    for name in (layout.archive, layout.archive.removesuffix(".gz")):
        if (path / name).is_file():
            return Found(layout, path / name)
    return None


def _tar_has(path: Path, layout: Layout) -> bool:
    """True unless the archive shows another layout's folder; a damaged one is refused when read."""
    return path.name not in PUBLISHED_MD5 or path.name == layout.archive


def _other_data_set(path: Path, name: str) -> str | None:
    for other, layouts in LAYOUTS.items():
        if other != name and any(_find_layout(layout, path) for layout in layouts):
            return other
    return None


def _member(folder: Path, name: str) -> Path:
    """Returns the file of that name in a folder, in whichever spelling and compression it is there."""
    for spelling in _spellings(name):
        if (folder / spelling).is_file():
            return folder / spelling
    return folder / name


def _spellings(name: str) -> tuple[str, ...]:
    dotted = name.replace("-idx", ".idx")
    return (name, f"{name}.gz", dotted, f"{dotted}.gz")


# Reading -----------------------------------------------------------------------------------------


def read(info: DatasetInfo, found: Found) -> tuple[Arrays, Arrays]:
    """Returns the (train, test) arrays of a layout.

    Raises UserError, one line, for a checksum, size or content that is not the official one.
    """
    read_split = {"cifar_python": _cifar_python, "cifar_binary": _cifar_binary, "idx": _idx}
    form = read_split[found.layout.form]
    with _opened(found) as files:
        train = form(info, files, found.layout.train, info.num_train)
        test = form(info, files, found.layout.test, info.num_test)
    return train, test


class _Files:
    """The files of a layout, by name: at most `limit` bytes of each are ever read."""

    def __init__(self, found: Found, members: dict[str, bytes | tarfile.TarInfo] | None) -> None:
        self._found = found
        self._members = members
        self._tar: tarfile.TarFile | None = None

    def bind(self, tar: tarfile.TarFile) -> None:
        """Reads from the members of an open archive."""
        self._tar = tar
        self._members = {Path(member.name).name: member for member in tar if member.isfile()}

    def read(self, name: str, limit: int) -> tuple[str, bytes]:
        """Returns (what to call it in an error, up to limit + 1 bytes, unzipped)."""
        if self._tar is None:
            path = _member(self._found.path, name)
            if not path.is_file():
                raise UserError(f"file {str(path)!r} is missing")
            with path.open("rb") as file:
                return str(path), _bounded(file, path.name, str(path), limit)
        assert self._members is not None
        for spelling in _spellings(name):
            member = self._members.get(spelling)
            if isinstance(member, tarfile.TarInfo):
                label = f"{self._found.path}:{member.name}"
                file = self._tar.extractfile(member)
                assert file is not None
                return label, _bounded(file, spelling, label, limit)
        raise UserError(f"archive {str(self._found.path)!r} has no member {name!r}")


def _bounded(file: IO[bytes], name: str, label: str, limit: int) -> bytes:
    try:
        if name.endswith(".gz"):
            with gzip.GzipFile(fileobj=file) as unzipped:
                return unzipped.read(limit + 1)
        return file.read(limit + 1)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"file {label!r} is damaged: {error}") from error


@contextlib.contextmanager
def _opened(found: Found) -> Iterator[_Files]:
    files = _Files(found, None)
    if not found.is_tar:
        yield files
        return
    _check_md5(found.path)
    try:
        with tarfile.open(found.path) as tar:
            files.bind(tar)
            yield files
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"archive {str(found.path)!r} is damaged: {error}") from error


def _check_md5(path: Path) -> None:
    expected = PUBLISHED_MD5.get(path.name)
    if expected is None:
        return
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "md5").hexdigest()
    if actual != expected:
        size = path.stat().st_size
        raise UserError(
            f"archive {str(path)!r} ({size:,} bytes) has MD5 {actual}, the official one {expected}; "
            "it is cut off, damaged or repacked (rename it if you repacked it)"
        )


def _check_size(label: str, content: bytes, expected: int) -> None:
    if len(content) != expected:
        actual = f"more than {expected:,}" if len(content) > expected else f"{len(content):,}"
        raise UserError(f"file {label!r} has {actual} bytes, not {expected:,}")


# CIFAR, binary: a record is label bytes (CIFAR-100: coarse, fine), then 3 planes of 32×32 pixels.


def _cifar_binary(info: DatasetInfo, files: _Files, names: tuple[str, ...], count: int) -> Arrays:
    height, width, channels = info.image_shape
    label_bytes = 2 if info.name == "cifar100" else 1
    record = label_bytes + height * width * channels
    blocks = []
    for name in names:
        expected = count // len(names) * record
        label, content = files.read(name, expected)
        _check_size(label, content, expected)
        blocks.append(np.frombuffer(content, np.uint8).reshape(-1, record))
    records = np.concatenate(blocks)
    labels = records[:, label_bytes - 1].astype(np.int32)
    return _planes_last(records[:, label_bytes:], info), labels


def _planes_last(planar: np.ndarray, info: DatasetInfo) -> np.ndarray:
    """Returns planar rows [N, C·H·W] as images [N, H, W, C]."""
    height, width, channels = info.image_shape
    images = planar.reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images)


# CIFAR, python: a pickled dict of `data` uint8 [N, 3072] and `labels` or `fine_labels`.


def _cifar_python(info: DatasetInfo, files: _Files, names: tuple[str, ...], count: int) -> Arrays:
    key = "fine_labels" if info.name == "cifar100" else "labels"
    size = int(np.prod(info.image_shape))
    images, labels = [], []
    for name in names:
        rows = count // len(names)
        limit = rows * (size + 200)  # pixels, and generously the labels and file names
        label, content = files.read(name, limit)
        if len(content) > limit:
            raise UserError(f"file {label!r} has more than {limit:,} bytes")
        batch = load_pickle(content, label)
        found = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
        data = found.get("data")
        if not isinstance(data, np.ndarray) or data.shape != (rows, size) or data.dtype != np.uint8:
            raise UserError(f"file {label!r} has no uint8 array 'data' of shape {(rows, size)}")
        if not isinstance(found.get(key), list) or len(found[key]) != rows:
            raise UserError(f"file {label!r} has no list {key!r} of {rows} labels")
        images.append(data)
        labels.append(np.asarray(found[key], np.int32))
    return _planes_last(np.concatenate(images), info), np.concatenate(labels)


_PICKLE_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _SafeUnpickler(pickle.Unpickler):
    """Admits what a numpy array in a plain container needs, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLE_ALLOWED:
            raise pickle.UnpicklingError(f"it wants {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def load_pickle(content: bytes, label: str) -> dict[Any, Any]:
    """Returns the dict in a pickle of numpy arrays and plain containers.

    Raises UserError if it wants anything else; nothing of it has run then.
    """
    try:
        batch = _SafeUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a hostile pickle may raise anything
        raise UserError(f"file {label!r} is refused as a pickle: {error}") from error
    if not isinstance(batch, dict):
        raise UserError(f"file {label!r} is a pickled {type(batch).__name__}, not a dict")
    return batch


# idx: big-endian magic (type 8 = uint8, number of axes), lengths, bytes.


def _idx(info: DatasetInfo, files: _Files, names: tuple[str, ...], count: int) -> Arrays:
    height, width, channels = info.image_shape
    images = _idx_array(files, names[0], (count, height, width))
    labels = _idx_array(files, names[1], (count,))
    return images.reshape(count, height, width, channels), labels.astype(np.int32)


def _idx_array(files: _Files, name: str, shape: tuple[int, ...]) -> np.ndarray:
    header = np.array([0x0800 + len(shape), *shape], ">i4").tobytes()
    expected = len(header) + int(np.prod(shape))
    label, content = files.read(name, expected)
    if content[: len(header)] != header:
        raise UserError(f"file {label!r} is not an idx file of uint8 {shape}: its header differs")
    _check_size(label, content, expected)
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)
