"""A sheet of sample images as the model gets them: the very batches of a run's first steps.

A row is a class. Its first image is of the test set, as it is evaluated; the others are those of
the class that training sees first, augmented with the draws of their own steps.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from normlab.data import DatasetInfo, fetch, pixels_of, train_indices, training_batch
from normlab.data.info import IMAGENET_MEAN
from normlab.errors import UserError, printable
from normlab.training import parallel
from normlab.training.examples import RunData, load_data
from normlab.training.setup import Parts, build_parts

if TYPE_CHECKING:
    from PIL.Image import Image

Samples = dict[int, list[np.ndarray]]  # label -> images, uint8 [H, W, C]

CELL = 64  # pixels of a cell's shorter side, at least: small images are shown n times as large
GAP, LABEL, TOP = 4, 132, 20  # pixels between cells, of the column of names and of the heading
MOST_PIXELS = 50_000_000  # of a sheet
SOFTWARE = "normlab data info"


def draw_sheet(config: ConfigDict, classes: int, samples: int) -> tuple[dict[str, str], "Image"]:
    """Returns ({what: fact}, picture): `samples` training images of each of the first `classes`.

    Fewer where an epoch has fewer. Raises UserError as `train` would, and for a sheet that would be
    larger than MOST_PIXELS.
    """
    parts = build_parts(config)
    num = min(classes, parts.info.num_classes)
    width, height = _size(num, min(samples, parts.info.num_train), parts.info.image_shape)
    if width * height > MOST_PIXELS:
        raise UserError(
            f"--classes={classes} and --samples={samples} make a sheet of {width:,}×{height:,} "
            f"pixels; {MOST_PIXELS:,} is the most"
        )
    shown = config.copy_and_resolve_references()
    with shown.unlocked():
        shown.data.eval_image_size = None  # all cells are of one size, the training's
    data = load_data(shown, parallel.make_mesh())
    trained = _training_samples(parts, data, num, samples)
    tested = _test_samples(parts, data, num)
    rows = [(_class_name(parts.info, k), tested[k], trained[k]) for k in range(num)]
    most = max(map(len, trained.values()))
    return _facts(parts, data), _draw(rows, most, parts.info.image_shape)


def check_path(path: Path) -> None:
    """Raises UserError if no sheet can be written there, or another file than one has that name."""
    from PIL import Image

    if not path.parent.is_dir():
        raise UserError(f"--sheet={str(path)!r}: there is no folder {str(path.parent)!r}")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--sheet={str(path)!r}: {str(path.parent)!r} cannot be written")
    if not path.exists():
        return
    try:
        with Image.open(path) as there:
            ours = there.info.get("Software") == SOFTWARE
    except Exception:  # it is no picture, or a damaged or a huge one
        ours = False
    if not ours:
        raise UserError(f"{str(path)!r} is there and is no sheet of samples; choose --sheet")


def save_sheet(sheet: "Image", path: Path) -> None:
    """Writes the picture as PNG; raises UserError as `check_path` does."""
    from PIL import PngImagePlugin

    check_path(path)
    facts = PngImagePlugin.PngInfo()
    facts.add_text("Software", SOFTWARE)
    sheet.save(path, "PNG", pnginfo=facts)


def _facts(parts: Parts, data: RunData) -> dict[str, str]:
    info, config = parts.info, parts.config.data
    splits = {"train": data.train, **data.evaluated}
    whose = " (ImageNet's)" if info.mean == IMAGENET_MEAN else ""
    return {
        "data set": f"{info.name}, source {config.source}",
        "images": ", ".join(f"{len(feed):,} {split}" for split, feed in splits.items()),
        "shape": "×".join(map(str, info.image_shape)) + " (height, width, channels)",
        "classes": f"{info.num_classes}: " + _shortened(info.class_names),
        "mean": ", ".join(f"{x:g}" for x in info.mean) + whose,
        "standard deviation": ", ".join(f"{x:g}" for x in info.std) + whose,
        "in memory": "yes" if info.one_size else "no: decoded batch by batch",
        "fingerprint": data.fingerprint,
    }


def _shortened(names: tuple[str, ...], most: int = 20) -> str:
    return ", ".join(map(printable, names[:most])) + (", ..." if len(names) > most else "")


def _training_samples(parts: Parts, data: RunData, classes: int, samples: int) -> Samples:
    """Returns the first `samples` images of each class that the run of this seed is trained on."""
    config, length = parts.config, parts.length
    found: Samples = {label: [] for label in range(classes)}
    indices = train_indices(
        config.seed, 0, length.steps_per_epoch, length.batch_size, len(data.train)
    )

    @jax.jit
    def batch(examples: Any, seed: Any, step: Any, rows: Any) -> Any:
        return training_batch(examples, config.data, parts.info, seed, step, rows)

    seed = parallel.seed_array(config.seed)
    for step, (examples, rows) in enumerate(data.train.steps(config.seed, 0, indices, 1)):
        images, targets = batch(examples, seed, jnp.asarray(step), jnp.asarray(rows[0]))
        labels = np.asarray(targets if targets.ndim == 1 else jnp.argmax(targets, -1))
        _collect(found, _pixels(images, parts.info), labels, samples)
        if all(len(images) == samples for images in found.values()):
            break
    return found


def _test_samples(parts: Parts, data: RunData, classes: int) -> Samples:
    """Returns the first image of each class in the test set, as it is evaluated."""
    found: Samples = {label: [] for label in range(classes)}
    feed = data.evaluated["test"]
    size = min(parts.config.eval.batch_size, len(feed))
    order = np.arange(len(feed), dtype=np.int32)
    batches = (order[i : i + size] for i in range(0, len(feed), size))
    for examples, rows in feed.batches(batches):
        images, labels = fetch(examples, jnp.asarray(rows), parts.info)
        _collect(found, _pixels(images, parts.info), np.asarray(labels), 1)
        if all(found.values()):
            break
    return found


def _collect(found: Samples, images: np.ndarray, labels: np.ndarray, samples: int) -> None:
    for image, label in zip(images, labels.tolist(), strict=True):
        if label in found and len(found[label]) < samples:
            found[label].append(image)


def _pixels(images: Any, info: DatasetInfo) -> np.ndarray:
    """Returns standardized images as they look: uint8."""
    return np.asarray(pixels_of(images, info))


def _class_name(info: DatasetInfo, label: int) -> str:
    return printable(info.class_names[label]) if info.class_names else str(label)


def _size(rows: int, samples: int, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Returns (width, height) of a sheet in pixels."""
    height, width = _cell(shape)
    return LABEL + (samples + 1) * (width + GAP) + 3 * GAP, TOP + rows * (height + GAP)


def _cell(shape: tuple[int, int, int]) -> tuple[int, int]:
    """Returns (height, width) of an image on the sheet, a whole multiple of its own."""
    scale = -(-CELL // min(shape[:2]))
    return scale * shape[0], scale * shape[1]


def _draw(rows: list[Any], samples: int, shape: tuple[int, int, int]) -> "Image":
    from PIL import Image, ImageDraw, ImageFont

    height, width = _cell(shape)
    scale = height // shape[0]
    sheet = Image.new("RGB", _size(len(rows), samples, shape), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    first = LABEL + width + 4 * GAP
    draw.text((LABEL, 2), "test", "black", font)
    draw.text((first, 2), "training, augmented", "black", font)
    for place, (name, tested, trained) in enumerate(rows):
        y = TOP + place * (height + GAP)
        draw.text((GAP, y + height / 2 - 8), _fitting(name, font), "black", font)
        cells = [(LABEL, image) for image in tested]
        cells += [(first + i * (width + GAP), image) for i, image in enumerate(trained)]
        for x, image in cells:
            pixels = np.repeat(np.repeat(image, scale, 0), scale, 1)
            pixels = pixels if pixels.shape[-1] == 3 else np.repeat(pixels, 3, -1)
            sheet.paste(Image.fromarray(pixels), (x, y))
    return sheet


def _fitting(name: str, font: Any) -> str:
    """Returns the name, cut to the width of its column."""
    while font.getlength(name) > LABEL - 2 * GAP:
        name = name.removesuffix("…")[:-1] + "…"
    return name
