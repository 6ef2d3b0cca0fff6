"""Is a data set on disk what it should be: file by file, its size and its checksum.

Of official archives the sums are published. Of class folders and of directories of
tensorflow-datasets every image is decoded; a record of the latter has a checksum of its own.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from normlab.data import archive, folder, tfds
from normlab.data.decode import wrong_label
from normlab.data.images import Encoded, prefetched
from normlab.data.info import DATASETS, DatasetInfo, dataset_info
from normlab.errors import UserError, one_line

# MD5 of the unpacked files. CIFAR's python version: torchvision/datasets/cifar.py. The others were
# computed from files whose packed sums are the published ones: MNIST's four .gz of
# torchvision/datasets/mnist.py, Debian's package dataset-fashion-mnist, and CIFAR-10's binaries.
OFFICIAL_MD5 = {
    "cifar10": {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
        "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
        "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
        "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
        "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
        "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
        "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
    },
    "cifar100": {
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    },
    "mnist": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "fashion_mnist": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}

CHUNK = 4096  # records read at a time


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found of one file."""

    file: str
    size: int | None  # bytes, unpacked; None if it could not be read
    md5: str | None  # of its content, unpacked
    fault: str = ""  # one line; "" if nothing is wrong
    note: str = ""  # what there is to say of a good one
    verdict: str = "ok"  # of one without a fault; "" of a sum of others that have some


def verify(name: str, source: str, path: str) -> Iterator[Finding]:
    """Yields what is found of each file of the data set `name` at `path`.

    `source` is a `data.source` that reads files: archive, tfds or folder. Raises UserError, one
    line, if there is no such data set at all.
    """
    if source == "archive":
        info = dataset_info(name)
        yield from _archive(info, archive.locate(info, path))
    elif source == "folder":
        yield from _folder(name, path)
    else:
        yield from _tfds(tfds.find(name, path), DATASETS.get(name))


def guess_source(name: str, path: str) -> str:
    """Returns the source that reads what lies at `path`, by a look at it."""
    root = Path(path).expanduser()
    if (root / "train").is_dir():
        return "folder"
    if tfds.directories(name, root):
        return "tfds"
    return "archive" if name in archive.LAYOUTS else "folder"


# Archives ----------------------------------------------------------------------------------------


def _archive(info: DatasetInfo, found: archive.Found) -> Iterator[Finding]:
    sizes = found.layout.sizes(info)
    if found.path.is_file():
        yield _packed(found.path)
        yield from _members(info, found, sizes)
        return
    for name, size in sizes.items():
        try:
            file = archive.in_folder(found.path, name)
            content = archive.read_file(file, size).content
        except UserError as error:
            yield Finding(str(found.path / name), None, None, str(error))
            continue
        yield _judged(info, found.layout, name, str(file), content, size)


def _packed(path: Path) -> Finding:
    """Returns what is found of an archive as a whole."""
    with path.open("rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    size = path.stat().st_size
    official = archive.PUBLISHED.get(path.name)
    if official is None:
        return Finding(str(path), size, md5, note="no published checksum under this name")
    return Finding(str(path), size, md5, _mismatch(size, md5, *official))


def _members(info: DatasetInfo, found: archive.Found, sizes: dict[str, int]) -> Iterator[Finding]:
    official = {spelling: name for name in sizes for spelling in archive.spellings(name)}
    seen, damage = set(), ""
    try:
        for member, file in archive.members(found.path, 2 * (sum(sizes.values()) + archive.ROOM)):
            name = official.get(member)
            if name is not None and name not in seen:
                content = archive.unzipped(file, member, sizes[name])
                seen.add(name)
                label = f"{found.path}:{member}"
                yield _judged(info, found.layout, name, label, content, sizes[name])
    except archive.DAMAGE as error:
        damage = f"; the archive is damaged: {error}"
    for name in sizes:
        if name not in seen:
            yield Finding(f"{found.path}:{name}", None, None, f"missing{damage}")


def _judged(
    info: DatasetInfo, layout: archive.Layout, name: str, label: str, content: bytes, limit: int
) -> Finding:
    size = len(content)
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    expected = OFFICIAL_MD5.get(info.name, {}).get(name)
    if size > limit:  # it was not read to its end
        return Finding(label, None, None, f"more than {limit:,} bytes")
    exact = limit if layout.form.exact else size
    if expected is None:
        fault = _mismatch(size, md5, exact, md5) or wrong_label(info, content)
        note = "size and labels alone; no published checksum, so the content cannot be proven"
        return Finding(label, size, md5, fault, "" if fault else note)
    return Finding(label, size, md5, _mismatch(size, md5, exact, expected))


def _mismatch(size: int, md5: str, right_size: int, right_md5: str) -> str:
    """Returns what is wrong with a size or else with a checksum, "" if nothing is."""
    if size != right_size:
        return f"{size:,} bytes, not {right_size:,}"
    return "" if md5 == right_md5 else f"MD5 {md5}, not {right_md5}"


# Class folders -----------------------------------------------------------------------------------


def _folder(name: str, path: str) -> Iterator[Finding]:
    known = DATASETS.get(name)
    for part, listing in zip(("train", "test"), folder.find(path), strict=True):
        images = listing.encoded()
        total = wrong = 0
        for i, found in enumerate(_faults(images)):
            if found:
                content = (listing.folder / listing.files[i]).read_bytes()
                md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
                yield Finding(images.name(i), len(content), md5, found)
            total += 1
            wrong += bool(found)
        note = f"{total:,} images in {len(listing.class_names)} classes, each decoded"
        if wrong:
            note += f"; {wrong:,} of them wrong"
        official = None if known is None else getattr(known, f"num_{part}")
        if official not in (None, total):
            note += f"; the official {name} has {official:,}"
        yield Finding(str(listing.folder), None, None, note=note, verdict="" if wrong else "ok")


def _faults(images: Encoded) -> Iterator[str]:
    """Yields what is wrong with each image or its label, "" if nothing is."""

    def fault(i: int) -> str:
        try:
            images.decode(i, 3)
        except UserError as error:
            return str(error)
        return ""

    return prefetched(range(len(images)), fault, ahead=256)


# tensorflow-datasets -----------------------------------------------------------------------------


def _tfds(found: tfds.Prepared, known: DatasetInfo | None) -> Iterator[Finding]:
    """Reads each shard by itself: it must have the records that dataset_info.json promises.

    Then each record of the splits that a model gets: its image is decoded, its label checked.
    """
    features = found.directory / tfds.FEATURES
    if not features.is_file():
        yield Finding(str(features), None, None, "missing")
    if known is not None and known.one_size:  # of others a part may be trained on
        official = (known.num_train, known.num_test)
        for split, count, right in zip(found.splits, found.counts, official, strict=True):
            if count != right:
                fault = f"{count:,} images, not {right:,}"
                yield Finding(f"{found.directory}: {split}", None, None, fault)
    info = json.loads((found.directory / tfds.INFO).read_text(encoding="utf-8"))
    readable = features.is_file()
    for split in info["splits"]:
        lengths = [int(length) for length in split["shardLengths"]]
        for shard, length in enumerate(lengths):
            file = f"{info['name']}-{split['name']}.{tfds.FORMAT}-{shard:05d}-of-{len(lengths):05d}"
            finding = _shard(found.directory / file, length)
            readable &= not finding.fault
            yield finding
    if readable:  # else the records are those of no split
        for split, images in zip(found.splits, found.encoded(), strict=True):
            yield from _records(found, split, images, known)


def _records(
    found: tfds.Prepared, split: str, images: Encoded, known: DatasetInfo | None
) -> Iterator[Finding]:
    classes = len(found.class_names) or (known.num_classes if known else None)
    images = dataclasses.replace(images, num_classes=classes)
    faults = _faults(images)
    wrong = 0
    for i, fault in enumerate(faults):
        wrong += bool(fault)
        if fault:
            yield Finding(images.name(i), None, None, fault)
    labels = "" if classes is None else ", each label one of the classes"
    note = f"{len(images):,} images, each decoded{labels}"
    if wrong:
        note = f"{len(images):,} images; {wrong:,} of them wrong"
    yield Finding(
        f"{found.directory}: {split}", None, None, note=note, verdict="" if wrong else "ok"
    )


def _shard(path: Path, length: int) -> Finding:
    from array_record.python.array_record_module import ArrayRecordReader

    if not path.is_file():
        return Finding(str(path), None, None, "missing")
    with path.open("rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    size = path.stat().st_size
    try:
        reader = ArrayRecordReader(str(path))
        count = reader.num_records()
        for first in range(0, count, CHUNK):
            reader.read(first, min(first + CHUNK, count))
        reader.close()
    except Exception as error:  # the reader in C++ raises what it likes
        return Finding(str(path), size, md5, f"cannot be read: {one_line(error)}")
    if count != length:
        return Finding(str(path), size, md5, f"{count:,} records, not {length:,}")
    note = f"{count:,} records, whole by their own checksums; there is no published one"
    return Finding(str(path), size, md5, note=note)
