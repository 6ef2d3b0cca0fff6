"""Folders of images, one a class: FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg.

The layout of ImageNet as people have it, and of Imagenette. A class is a folder's name; labels are
the places of the names in their sorted order. The test split is `test` if that has class folders,
else `val` (ImageNet's own test images have no public labels). Images may lie deeper below their
class; hidden files and files that are no images by their suffix are passed over.
"""

import dataclasses
import functools
import os
from pathlib import Path

from normlab.data.images import Encoded
from normlab.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
TEST_FOLDERS = ("test", "val", "validation")


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images of one split, by class."""

    folder: Path
    class_names: tuple[str, ...]
    files: tuple[str, ...]  # relative to the folder, class by class, sorted
    labels: tuple[int, ...]  # of each file

    def encoded(self) -> Encoded:
        """Returns the images, to be read when they are asked for."""

        def path(i: int) -> Path:
            return self.folder / self.files[i]

        def read(i: int) -> tuple[bytes, int]:
            return path(i).read_bytes(), self.labels[i]

        return Encoded(len(self.files), read, lambda i: str(path(i)))

    def sizes(self) -> list[tuple[str, int]]:
        """Returns (file, bytes) of each image."""
        return [(file, os.stat(self.folder / file).st_size) for file in self.files]


def find(path_text: str | None) -> tuple[Listing, Listing]:
    """Returns the (train, test) images below `data.path`.

    Raises UserError, one line, for a folder that does not exist or has not this layout.
    """
    if not path_text:
        raise UserError("config field 'data.path' is not set; it names a folder with train/, val/")
    field = f"config field 'data.path' = {path_text!r}"
    root = Path(os.path.expanduser(path_text))
    try:
        if not root.is_dir():
            why = "is not a folder" if root.exists() else "does not exist"
            raise UserError(f"{field} {why}")
        if not _classes(root / "train"):
            raise UserError(f"{field} has no folder 'train' with a folder of images for each class")
        test = next((name for name in TEST_FOLDERS if _classes(root / name)), None)
        if test is None:
            raise UserError(f"{field} has no folder 'val' with a folder of images for each class")
        listings = list_images(root / "train"), list_images(root / test)
    except OSError as error:
        raise UserError(f"{field} cannot be read: {error}") from error
    names, others = (listing.class_names for listing in listings)
    if names != others:
        name = min(set(names) ^ set(others))
        lacking, having = ("train", test) if name in others else (test, "train")
        raise UserError(f"{field}: class {name!r} is in {having!r} and not in {lacking!r}")
    return listings


def list_images(folder: Path) -> Listing:
    """Returns the images of one split; listed once as long as no class folder changes."""
    names = _classes(folder)
    return _listing(folder, names, tuple(os.stat(folder / name).st_mtime_ns for name in names))


@functools.lru_cache(maxsize=8)
def _listing(folder: Path, names: tuple[str, ...], changed: tuple[int, ...]) -> Listing:
    files, labels = [], []
    for label, name in enumerate(names):
        found = sorted(_images(folder / name, name, ()))
        if not found:
            raise UserError(f"class folder {str(folder / name)!r} has no image")
        files += found
        labels += [label] * len(found)
    return Listing(folder, names, tuple(files), tuple(labels))


def _classes(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        return ()
    with os.scandir(folder) as entries:
        return tuple(sorted(x.name for x in entries if x.is_dir() and not x.name.startswith(".")))


def _images(folder: Path, prefix: str, above: tuple[Path, ...]) -> list[str]:
    """Returns the images below a folder, named from `prefix`.

    `above` are the folders that led here, links resolved. Raises UserError for a link to one of
    them, or to what they lie in: it would be followed for ever.
    """
    here = folder.resolve()
    if folder.is_symlink() and any(
        place.is_relative_to(here) for place in (*above, folder.parent.resolve())
    ):
        raise UserError(f"{str(folder)!r} is a link to a folder that it lies in")
    above = (*above, here)
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{prefix}/{entry.name}"
            if entry.is_dir():
                found += _images(folder / entry.name, name, above)
            elif entry.name.lower().endswith(SUFFIXES):
                found.append(name)
    return found
