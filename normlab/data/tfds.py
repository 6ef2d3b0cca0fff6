"""Directories of tensorflow-datasets in its format array_record, read without TensorFlow.

`data.path` is the directory that holds them (usually ~/tensorflow_datasets), or one data set's, or
one version's: the folder with dataset_info.json. `normlab data prepare` writes such a directory.
Data sets that normlab does not know by name work, too: an `image` and a `label` is all they need.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from normlab.data.images import Encoded
from normlab.errors import UserError, one_line, quoted

INFO, FEATURES, LABELS = "dataset_info.json", "features.json", ".labels.txt"
FORMAT = "array_record"
NAMES = {"imagenet": "imagenet2012"}
"""Names in the catalogue of tensorflow-datasets, where they are not ours."""

TEST_SPLITS = ("test", "validation")
UNLABELLED = {("imagenet2012", "test")}  # (data set, split) whose labels are all -1


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One version of a data set on disk."""

    directory: Path
    splits: tuple[str, str]  # names of those to train and to test on
    counts: tuple[int, int]  # their examples
    class_names: tuple[str, ...]  # empty if the directory does not say them

    def files(self) -> list[tuple[str, int]]:
        """Returns (name, bytes) of each file of the data set, by name; strangers are passed over.

        Those are its shards, its descriptions and its class names.
        """
        there = (x for x in self.directory.iterdir() if self._is_part(x.name) and x.is_file())
        return sorted((x.name, x.stat().st_size) for x in there)

    def _is_part(self, file: str) -> bool:
        if file.startswith("."):
            return False
        return file in (INFO, FEATURES) or file.endswith(LABELS) or f".{FORMAT}-" in file

    def encoded(self) -> tuple[Encoded, Encoded]:
        """Returns the (train, test) images, to be read when they are asked for."""
        train, test = (self._encoded(*pair) for pair in zip(self.splits, self.counts, strict=True))
        return train, test

    def _encoded(self, split: str, count: int) -> Encoded:
        import tensorflow_datasets as tfds

        decoders = {"image": tfds.decode.SkipDecoding()}
        try:
            builder = tfds.builder_from_directory(self.directory)
            source = builder.as_data_source(split, decoders=decoders)
        except Exception as error:  # of many kinds, those of a reader in C++ among them
            raise UserError(f"{str(self.directory)!r} cannot be read: {one_line(error)}") from error

        def name(i: int) -> str:
            return f"{self.directory}: {split}[{i}]"

        def read(i: int) -> tuple[bytes, int]:
            try:
                row = source[i]
                return row["image"], int(row["label"])
            except Exception as error:
                raise UserError(f"{name(i)!r} cannot be read: {one_line(error)}") from error

        return Encoded(count, read, name)


def find(name: str, path_text: str | None) -> Prepared:
    """Returns where the data set `name` was prepared, at or below `data.path`: its newest version.

    Reads its JSON and imports nothing. Raises UserError, one line, for a path that holds no such
    directory, and for one of another format than array_record.
    """
    if not path_text:
        raise UserError(
            "config field 'data.path' is not set; it names a directory of tensorflow-datasets"
        )
    field = f"config field 'data.path' = {path_text!r}"
    root = Path(os.path.expanduser(path_text))
    known_as = NAMES.get(name, name)
    try:
        found = directories(name, root)
        if not found:
            why = f"holds no {known_as}/VERSION/{INFO}" if root.exists() else "does not exist"
            raise UserError(f"{field} {why}; see 'normlab data prepare'")
        return _describe(found[-1], known_as)
    except OSError as error:
        raise UserError(f"{field} cannot be read: {error}") from error


def directories(name: str, root: Path) -> list[Path]:
    """Returns the folders with a dataset_info.json where `find` looks for the data set `name`."""
    places = [root, *_versions(root), *_versions(root / NAMES.get(name, name))]
    return [place for place in places if (place / INFO).is_file()]


def _versions(folder: Path) -> list[Path]:
    """Returns the folders called like versions (1.0.0), oldest first."""
    inside = folder.iterdir() if folder.is_dir() else ()
    numbered = [x for x in inside if x.is_dir() and x.name.replace(".", "").isdigit()]
    return sorted(numbered, key=lambda x: [int(part) for part in x.name.split(".") if part])


def _describe(directory: Path, name: str) -> Prepared:
    try:
        info: dict[str, Any] = json.loads((directory / INFO).read_text(encoding="utf-8"))
        counts = {x["name"]: sum(map(int, x["shardLengths"])) for x in info["splits"]}
        there, form = str(info["name"]), str(info.get("fileFormat", "tfrecord"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{str(directory / INFO)!r} is damaged: {one_line(error)}") from error
    for split, count in counts.items():
        if not 0 <= count < 2**31:
            raise UserError(
                f"{str(directory / INFO)!r} is damaged: split {quoted(str(split))} has no number "
                "of examples that can be"
            )
    if there != name:
        raise UserError(f"{str(directory)!r} holds {there!r}, not {name!r}")
    if form != FORMAT:
        raise UserError(
            f"{str(directory)!r} is in the format {form!r}, which only TensorFlow reads; prepare "
            f"it once more with file_format={FORMAT!r}"
        )
    labelled = [split for split in counts if (name, split) not in UNLABELLED]
    test = next((split for split in TEST_SPLITS if split in labelled), None)
    if "train" not in counts or test is None:
        splits = ", ".join(counts) or "none"
        raise UserError(f"{str(directory)!r} needs the splits 'train' and 'test'; it has {splits}")
    labels = directory / "label.labels.txt"
    names = labels.read_text(encoding="utf-8").split("\n") if labels.is_file() else []
    class_names = tuple(line for line in names if line)
    return Prepared(directory, ("train", test), (counts["train"], counts[test]), class_names)
