"""Writing a directory of tensorflow-datasets, without TensorFlow.

Images go in as encoded bytes: arrays as PNG, files as they are. The format is array_record, the
order that of the source (`disable_shuffling`), names and versions those of the catalogue, so that
`tfds.builder_from_directory` and, for MNIST, Fashion-MNIST and CIFAR-10, whose features are the
catalogue's, `tfds.data_source(name, data_dir=...)` read it, too.
"""

import contextlib
import io
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from normlab.data.images import Encoded, prefetched
from normlab.data.info import DATASETS
from normlab.data.sources import AnySplit, Dataset
from normlab.data.tfds import FORMAT, NAMES
from normlab.errors import UserError, unknown

_LOG = logging.getLogger(__name__)

VERSIONS = {"cifar10": "3.0.2", "cifar100": "3.0.2", "mnist": "3.0.1", "fashion_mnist": "3.0.1"}
OWN_VERSION = "1.0.0"  # of what is not in the catalogue in this form


def target(name: str, data_dir: Path) -> Path:
    """Returns the folder that `write` makes.

    Raises UserError if it is there already or cannot be made, or for a name that is no folder's.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UserError(f"data set {name!r}: a name to prepare has letters, digits, _ and - alone")
    folder = data_dir / NAMES.get(name, name) / VERSIONS.get(name, OWN_VERSION)
    there = next(place for place in folder.absolute().parents if os.path.lexists(place))
    if not there.is_dir():
        raise UserError(f"--to={str(data_dir)!r}: {str(there)!r} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--to={str(data_dir)!r}: {str(there)!r} cannot be written")
    if folder.exists():
        raise UserError(f"{str(folder)!r} is there already; move it away to prepare it again")
    return folder


def _incomplete(folder: Path) -> set[Path]:
    """Returns where tensorflow-datasets writes, or wrote, what is renamed when it is whole."""
    return set(folder.glob("incomplete.*"))


@contextlib.contextmanager
def _nothing_left(folder: Path) -> Iterator[None]:
    """Removes what the block leaves besides DATA_DIR/NAME/VERSION, the `folder`.

    What was left before, by a process that was killed, is named and kept: it may be at work.
    """
    before, existed = _incomplete(folder.parent), folder.parent.parent.is_dir()
    for leftover in sorted(before):
        _LOG.warning("%s is of a prepare that was killed, or is at work now", leftover)
    try:
        yield
    finally:
        for leftover in _incomplete(folder.parent) - before:
            shutil.rmtree(leftover, ignore_errors=True)
        downloads = folder.parent.parent / "downloads"
        empty = [downloads / "extracted", downloads, folder.parent]
        for place in empty if existed else [*empty, folder.parent.parent]:
            with contextlib.suppress(OSError):  # it is not empty, or not there
                place.rmdir()


def _check_class_names(names: tuple[str, ...]) -> None:
    """Raises UserError for a name that a file of a line a name does not give back."""
    for name in names:
        is_line = name.splitlines() == [name] and name.strip() == name
        if not is_line or name != name.encode(errors="replace").decode():
            raise UserError(
                f"class {name!r} cannot be written: line breaks, blanks at an end and what is no "
                "UTF-8 would be lost"
            )


def write(data: Dataset, data_dir: Path) -> Path:
    """Writes DATA_DIR/NAME/VERSION; returns it.

    Raises UserError if it is there already, or for a damaged image, a label or a class name that
    cannot be written; then nothing is left.
    """
    import tensorflow_datasets as tfds

    folder, info = target(data.info.name, data_dir), data.info
    _check_class_names(info.class_names)
    has_id = info.name in ("cifar10", "cifar100")
    height, width, channels = info.image_shape
    sides = (height, width) if info.one_size else (None, None)
    classes = {"names": info.class_names} if info.class_names else {"num_classes": info.num_classes}
    features = {
        **({"id": tfds.features.Text()} if has_id else {}),
        "image": tfds.features.Image(shape=(*sides, channels)),
        "label": tfds.features.ClassLabel(**classes),
    }

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        name = folder.parent.name
        VERSION = tfds.core.Version(folder.name)

        @classmethod
        def _get_pkg_dir_path(cls) -> Any:  # tfds looks for citations beside a builder's module
            from etils import epath

            return epath.Path(__file__).parent

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"{info.name}, written by normlab in the order of its source.",
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                disable_shuffling=True,
            )

        def _split_generators(self, _: Any) -> Any:
            test = "validation" if info.name == "imagenet" else "test"
            return {"train": self._generate_examples("train"), test: self._generate_examples(test)}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
            examples = data.train if split == "train" else data.test
            for i, (content, label) in enumerate(_examples(examples)):
                row = {"image": io.BytesIO(content), "label": label}
                yield i, ({"id": f"{split}_{i:05d}"} if has_id else {}) | row

    tfds.disable_progress_bar()
    builder = Builder(data_dir=os.fspath(data_dir), file_format=FORMAT)
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    # It calls this a download.
    with contextlib.redirect_stdout(io.StringIO()), _nothing_left(folder):
        builder.download_and_prepare(download_config=config)
    return folder


def _examples(split: AnySplit) -> Iterator[tuple[bytes, int]]:
    """Yields (encoded image, label)."""
    if isinstance(split, Encoded):
        yield from prefetched(range(len(split)), lambda i: _checked(split, i), ahead=64)
        return
    for image, label in zip(split.images, split.labels, strict=True):
        yield png(image), int(label)


def _checked(split: Encoded, i: int) -> tuple[bytes, int]:
    """Returns example i as it is; raises UserError if a model could not have it."""
    split.decode(i, 3)
    return split.read(i)


def png(image: np.ndarray) -> bytes:
    """Returns an image, uint8 [H, W, 1 or 3], as the bytes of a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def write_by_catalogue(name: str, archives: Path, data_dir: Path) -> Path:
    """Prepares a data set of the catalogue by its own builder, which needs TensorFlow.

    `archives` is the folder with the archives that are downloaded by hand. Raises UserError if it
    does not exist, the catalogue has no such data set, or TensorFlow is not installed.
    """
    import importlib.util

    import tensorflow_datasets as tfds

    folder = target(name, data_dir)
    if not archives.exists():
        raise UserError(f"--path={str(archives)!r} does not exist")
    known_as = NAMES.get(name, name)
    catalogue = tfds.list_builders(with_community_datasets=False)
    if known_as not in catalogue:
        raise unknown("data set", name, [*DATASETS, *catalogue])
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"data set {name!r} is prepared by the builder of tensorflow-datasets, which needs "
            "TensorFlow: pip install 'normlab[tf]'"
        )
    builder = tfds.builder(known_as, data_dir=os.fspath(data_dir), file_format=FORMAT)
    config = tfds.download.DownloadConfig(manual_dir=archives, try_download_gcs=False)
    with _nothing_left(folder):
        builder.download_and_prepare(download_config=config)
    return Path(builder.data_path)
