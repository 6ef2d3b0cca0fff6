"""The official files of CIFAR-10, CIFAR-100, MNIST and Fashion-MNIST, as people have them on disk.

CIFAR: the python or the binary version, as the tar.gz or unpacked. MNIST and Fashion-MNIST: the
four idx files, gzipped or not, in a folder or a tar. `data.path` is the archive, the folder with
the files, or the folder that holds either. Archives are read in memory, member by member; nothing
is written to disk, so no member's name can lead anywhere. No read goes past the size that a file
must have, so a small file that unpacks to a huge one is refused and not unpacked.

Published sizes and MD5 sums are checked for the official tar.gz files, known by their names. Single
idx.gz files go about in several compressions of the same bytes (Debian's Fashion-MNIST is one), so
of these the unpacked size, the header and gzip's own checksum are checked.
"""

import dataclasses
import gzip
import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from normlab.data.decode import CIFAR_BINARY, CIFAR_PYTHON, IDX, Arrays, File, Form
from normlab.data.info import DatasetInfo
from normlab.errors import UserError

# Bytes and MD5; the sums are from https://www.cs.toronto.edu/~kriz/cifar.html.
PUBLISHED = {
    "cifar-10-python.tar.gz": (170_498_071, "c58f30108f718f92721af3b95e74349a"),
    "cifar-10-binary.tar.gz": (170_052_171, "c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar-100-python.tar.gz": (169_001_437, "eb9058c3a382ffc7106e4002c42a8d85"),
    "cifar-100-binary.tar.gz": (168_513_733, "03b5dce01913d631647c71ecec9e9cb8"),
}

ROOM = 2**20  # bytes of an archive's headers and small files (readme, names of the classes)
_LARGEST = 2**28  # bytes; no archive unpacks to more (CIFAR: 2^27.5)
DAMAGE = (OSError, EOFError, zlib.error, tarfile.TarError)


@dataclasses.dataclass(frozen=True)
class Layout:
    """One official layout: its archive, the folders it unpacks to, and the files of each split."""

    archive: str
    folders: tuple[str, ...]
    form: Form
    train: tuple[str, ...]
    test: tuple[str, ...]

    def sizes(self, info: DatasetInfo) -> dict[str, int]:
        """Returns the bytes of each file, unpacked, by its official name (see `Form.sizes`)."""
        train = self.form.sizes(info, info.num_train, len(self.train))
        test = self.form.sizes(info, info.num_test, len(self.test))
        return dict(zip(self.train + self.test, train + test, strict=True))


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_IDX_TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
_IDX_TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

LAYOUTS = {
    "cifar10": (
        Layout(
            "cifar-10-python.tar.gz",
            ("cifar-10-batches-py",),
            CIFAR_PYTHON,
            _BATCHES,
            ("test_batch",),
        ),
        Layout(
            "cifar-10-binary.tar.gz",
            ("cifar-10-batches-bin",),
            CIFAR_BINARY,
            tuple(f"{name}.bin" for name in _BATCHES),
            ("test_batch.bin",),
        ),
    ),
    "cifar100": (
        Layout(
            "cifar-100-python.tar.gz",
            ("cifar-100-python",),
            CIFAR_PYTHON,
            ("train",),
            ("test",),
        ),
        Layout(
            "cifar-100-binary.tar.gz",
            ("cifar-100-binary",),
            CIFAR_BINARY,
            ("train.bin",),
            ("test.bin",),
        ),
    ),
    "mnist": (Layout("mnist.tar.gz", ("mnist", "MNIST/raw"), IDX, _IDX_TRAIN, _IDX_TEST),),
    "fashion_mnist": (
        Layout(
            "fashion-mnist.tar.gz",
            ("fashion-mnist", "FashionMNIST/raw"),
            IDX,
            _IDX_TRAIN,
            _IDX_TEST,
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class Found:
    """Where a layout was found: `path` is the folder with its files, or a tar archive."""

    layout: Layout
    path: Path


# Finding -----------------------------------------------------------------------------------------


def find(info: DatasetInfo, path_text: str | None) -> Found:
    """Returns where the files of a data set are, having opened none that is large.

    Raises UserError as `locate` does, and for a file that is missing or has the wrong number of
    bytes.
    """
    found = locate(info, path_text)
    try:
        _check_files(info, found)
    except OSError as error:
        raise UserError(f"{str(found.path)!r} cannot be read: {error}") from error
    return found


def locate(info: DatasetInfo, path_text: str | None) -> Found:
    """Returns where a data set is, whatever state its files are in.

    Raises UserError for a path that is unset, does not exist, or holds another data set or none.
    """
    layouts = LAYOUTS.get(info.name)
    if layouts is None:
        raise UserError(f"data set {info.name!r} has no archive; use --config.data.source=sklearn")
    if not path_text:
        wanted = " or ".join(layout.archive for layout in layouts)
        raise UserError(f"config field 'data.path' is not set; it names {wanted}, packed or not")
    field = f"config field 'data.path' = {path_text!r}"
    path = Path(os.path.expanduser(path_text))
    try:
        if not path.exists():
            raise UserError(f"{field} does not exist")
        found = _search(path)
        if info.name in found:
            return found[info.name]
    except DAMAGE as error:
        raise UserError(f"{field} cannot be read: {error}") from error
    if found:
        hint = f"it holds {' or '.join(map(repr, found))}"
    else:
        wanted = ", ".join(f"{layout.folders[0]}/, {layout.archive}" for layout in layouts)
        hint = f"looked for {wanted}"
    raise UserError(f"{field} holds no {info.name!r}; {hint}")


def _search(path: Path) -> dict[str, Found]:
    """Returns what is at `path`, by data set."""
    member = _known_member(path) if path.is_file() and path.name not in PUBLISHED else None
    found: dict[str, Found] = {}
    for name, layouts in LAYOUTS.items():
        for layout in layouts:
            if path.is_file():
                is_it = path.name == layout.archive or member in _all_spellings(layout)
                place = path if is_it else None
            else:
                place = _place(layout, path)
            if place is not None:
                found.setdefault(name, Found(layout, place))
    return found


def _place(layout: Layout, path: Path) -> Path | None:
    """Returns the folder or archive of a layout in the folder `path`, or `path` itself, or None."""
    for folder in (path, *(path / name for name in layout.folders)):
        if any((folder / spelling).is_file() for spelling in _all_spellings(layout)):
            return folder
    stem = layout.archive.removesuffix(".tar.gz")
    for suffix in (".tar.gz", ".tgz", ".tar"):
        if (path / (stem + suffix)).is_file():
            return path / (stem + suffix)
    return None


def _known_member(path: Path) -> str | None:
    """Returns the first file name in a tar archive that belongs to any layout."""
    known = {s for layouts in LAYOUTS.values() for each in layouts for s in _all_spellings(each)}
    for member, _ in members(path, _LARGEST):
        if member in known:
            return member
    return None


def spellings(name: str) -> tuple[str, ...]:
    """Returns the names under which an official file goes about."""
    dotted = name.replace("-idx", ".idx")
    return (name, dotted, f"{name}.gz", f"{dotted}.gz")


def _all_spellings(layout: Layout) -> set[str]:
    return {spelling for name in layout.train + layout.test for spelling in spellings(name)}


def in_folder(folder: Path, name: str) -> Path:
    """Returns the file called `name`, in whichever spelling and compression it is there."""
    for spelling in spellings(name):
        if (folder / spelling).is_file():
            return folder / spelling
    raise UserError(f"file {str(folder / name)!r} is missing")


def _check_files(info: DatasetInfo, found: Found) -> None:
    """Checks what file sizes tell."""
    path = found.path
    if path.is_file():
        actual = path.stat().st_size
        expected, _ = PUBLISHED.get(path.name, (actual, None))
        if actual != expected:
            raise UserError(
                f"archive {str(path)!r} has {actual:,} bytes, the official one {expected:,}; "
                "it is cut off or repacked (rename it if you repacked it)"
            )
        return
    for name, size in found.layout.sizes(info).items():
        file = in_folder(path, name)
        if file.suffix != ".gz":
            _check_size(str(file), file.stat().st_size, size, found.layout.form.exact)


def _check_size(label: str, actual: int, expected: int, exact: bool) -> None:
    if actual > expected:  # how many more is unknown of a file that was not read to its end
        raise UserError(f"file {label!r} has more than {expected:,} bytes")
    if exact and actual < expected:
        raise UserError(f"file {label!r} has {actual:,} bytes, not {expected:,}")


# Reading -----------------------------------------------------------------------------------------


def read(info: DatasetInfo, found: Found) -> tuple[Arrays, Arrays]:
    """Returns the (train, test) arrays of a layout.

    Raises UserError, one line, for a checksum, size or content that is not the official one.
    """
    layout = found.layout
    sizes = layout.sizes(info)
    if found.path.is_file():
        _check_md5(found.path)
        files = _read_tar(found.path, sizes)
    else:
        files = {name: read_file(in_folder(found.path, name), sizes[name]) for name in sizes}
    for name, file in files.items():
        _check_size(file.label, len(file.content), sizes[name], layout.form.exact)
    train = layout.form.decode(info, [files[name] for name in layout.train], info.num_train)
    test = layout.form.decode(info, [files[name] for name in layout.test], info.num_test)
    return train, test


def _check_md5(path: Path) -> None:
    _, expected = PUBLISHED.get(path.name, (None, None))
    if expected is None:
        return
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
    except OSError as error:
        raise UserError(f"archive {str(path)!r} cannot be read: {error}") from error
    actual = digest.hexdigest()
    if actual != expected:
        raise UserError(
            f"archive {str(path)!r} has MD5 {actual}, the official one {expected}; "
            "it is damaged or repacked (rename it if you repacked it)"
        )


def read_file(path: Path, limit: int) -> File:
    """Returns a file, unzipped; at most limit + 1 bytes of it are read."""
    try:
        with path.open("rb") as file:
            return File(str(path), unzipped(file, path.name, limit))
    except DAMAGE as error:
        raise UserError(f"file {str(path)!r} is damaged: {error}") from error


def _read_tar(path: Path, limits: dict[str, int]) -> dict[str, File]:
    """Returns the files named in `limits`; at most limit + 1 bytes of each are read."""
    official = {spelling: name for name in limits for spelling in spellings(name)}
    files: dict[str, File] = {}
    try:
        for member, content in members(path, 2 * (sum(limits.values()) + ROOM)):
            name = official.get(member)
            if name is not None and name not in files:
                label = f"{path}:{member}"
                files[name] = File(label, unzipped(content, member, limits[name]))
            if len(files) == len(limits):
                break
    except DAMAGE as error:
        raise UserError(f"archive {str(path)!r} is damaged: {error}") from error
    for name in limits:
        if name not in files:
            raise UserError(f"archive {str(path)!r} has no file {name!r}")
    return files


def unzipped(file: IO[bytes], name: str, limit: int) -> bytes:
    """Returns a file's content, unzipped if `name` says so; at most limit + 1 bytes of it."""
    if name.endswith(".gz"):
        with gzip.GzipFile(fileobj=file) as unzipped:
            return unzipped.read(limit + 1)
    return file.read(limit + 1)


def members(path: Path, limit: int) -> Iterator[tuple[str, IO[bytes]]]:
    """Yields (name without folders, content) of each regular file in a tar or tar.gz, in its order.

    One pass without seeking back: CIFAR's members are in no order, and seeking would unpack the
    archive anew for each. Raises tarfile.TarError past `limit` unpacked bytes.
    """
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        unpacked = _Limited(gzip.GzipFile(fileobj=file) if is_gzip else file, limit)
        with tarfile.open(fileobj=unpacked, mode="r|") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isfile() else None
                if content is not None:
                    yield Path(member.name).name, content


class _Limited(io.BufferedIOBase):
    """A file of which no more than `limit` bytes can be read."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile, limit: int) -> None:
        self._file, self._left = file, limit

    def read(self, size: int | None = -1) -> bytes:
        """Returns up to `size` bytes; raises tarfile.ReadError past the limit."""
        content = self._file.read(-1 if size is None else size)
        self._left -= len(content)
        if self._left < 0:
            raise tarfile.ReadError("it unpacks to more than the data set has")
        return content
