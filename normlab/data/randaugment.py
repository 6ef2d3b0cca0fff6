"""RandAugment: N operations in a row, drawn for each image. Pure, on the device, for a whole batch.

Cubuk, Zoph, Shlens & Le 2020, arXiv:1909.13719. The sixteen operations and what a magnitude means
are those of the code that NFNets were trained with (deepmind-research/nfnets, autoaugment.py), with
m = magnitude / 10:

    autocontrast, equalize, invert   no magnitude
    posterize                        ⌊4m⌋ bits are kept: the larger m, the less it does
    solarize                         from ⌊256m⌋ on inverted, likewise
    solarize_add                     ⌊110m⌋ is added below 128
    color, contrast, brightness, sharpness    by a factor of 1.8m + 0.1; 1 is the image itself
    rotate                           ±30m degrees about the middle
    shear_x, shear_y                 by ±0.3m, from the corner at the top left
    translate_x, translate_y         by ±100m/224 of the side (100m pixels of 224)
    cutout                           a square of 2·⌊40m·side/224⌋ pixels, its centre anywhere

What comes in from outside and what is cut out is grey, 128. Neighbours are not interpolated.

An operation is one of four kinds: a table of 256 values, a blend of pixels with others, a map of
places, a hole. So all images go through one of each, which leaves those alone that drew another:
five passes over the batch, where a branch for each operation under `vmap` would take sixteen.

Departures from that code, towards Pillow, whose operations those are: `contrast` blends with the
mean brightness (there with the number of pixels / 256, at most 255), `sharpness` rounds its mean of
neighbours (there cut to an integer), and a brightness is Pillow's, in integers. Places are of
pixels' middles. Lengths go with the image's side, where there they are pixels. Grey images have one
channel, and no colour.
"""

import jax
import jax.numpy as jnp
from jax import Array

from normlab.data.augmentation import rectangles
from normlab.data.draws import RANDAUGMENT

OPERATIONS = (
    "autocontrast",
    "equalize",
    "invert",
    "posterize",
    "solarize",
    "solarize_add",
    "brightness",
    "contrast",
    "color",
    "sharpness",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "cutout",
)
"""What is drawn from, each as likely."""

_TABLES = OPERATIONS[:8]
_GREY = 128


def rand_augment(key: Array, images: Array, *, layers: int, magnitude: int) -> Array:
    """Returns the images uint8 [N, H, W, C] after `layers` operations each, C 1 or 3."""
    count, height, width, _ = images.shape
    for layer in range(layers):
        keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, RANDAUGMENT), layer), 3)
        operations = jax.random.randint(keys[0], (count,), 0, len(OPERATIONS))
        signs = jax.random.rademacher(keys[1], (count,), jnp.float32)
        centres = jax.random.randint(keys[2], (count, 2), 0, jnp.array([height, width]))
        images = distort(images, operations, signs, centres, magnitude)
    return images


def distort(
    images: Array, operations: Array, signs: Array, centres: Array, magnitude: int
) -> Array:
    """Returns each image after one operation: uint8 [N, H, W, C].

    `operations`: int [N], places in `OPERATIONS`; `signs`: float [N], 1 or −1, the direction of
    what has one; `centres`: int [N, 2], row and column of a hole's centre.
    """
    _, height, width, _ = images.shape
    level = magnitude / 10
    x = images.astype(jnp.int32)
    drawn = {name: (operations == place) for place, name in enumerate(OPERATIONS)}
    x = look_up(x, table_of(x, drawn, level))
    factor = _factor(level)
    x = _where(drawn["color"], blended(brightness_of(x), x, factor), x)
    x = _where(drawn["sharpness"], blended(smoothed(x), x, factor), x)
    x = warp(x, matrices(drawn, signs, level, height, width))
    half = int(level * 40 * min(height, width) / 224)
    hole = rectangles(centres - half, 2 * half, height, width) & drawn["cutout"][:, None, None]
    return jnp.where(hole[..., None], _GREY, x).astype(images.dtype)


def _factor(level: float) -> float:
    return 1.8 * level + 0.1


def _where(chosen: Array, then: Array, otherwise: Array) -> Array:
    return jnp.where(chosen[:, None, None, None], then, otherwise)


def blended(others: Array, images: Array, factor: float) -> Array:
    """Returns others + factor·(images − others), cut to integers from 0 to 255."""
    value = others + factor * (images - others).astype(jnp.float32)
    return jnp.clip(jnp.floor(value), 0, 255).astype(jnp.int32)


def brightness_of(images: Array) -> Array:
    """Returns the brightness int32 [N, H, W, 1], that of ITU-R 601 in sixteen bits as Pillow's."""
    if images.shape[-1] == 1:
        return images
    weights = jnp.array([19595, 38470, 7471])
    return (jnp.sum(images * weights, -1, keepdims=True) + 0x8000) >> 16


# Tables ------------------------------------------------------------------------------------------


def table_of(images: Array, drawn: dict[str, Array], level: float) -> Array:
    """Returns what becomes of each value, int32 [N, C, 256]; `drawn`: bool [N] by operation.

    The values themselves for an image that drew none of the first eight operations.
    """
    value = jnp.arange(256)
    histogram = histograms(images)
    mean = jnp.mean(brightness_of(images).astype(jnp.float32), (1, 2, 3))
    middle = jnp.floor(mean + 0.5).astype(jnp.int32)[:, None, None]
    factor, shift = _factor(level), max(8 - int(4 * level), 0)
    tables = {
        "autocontrast": autocontrast(histogram),
        "equalize": equalize(histogram),
        "invert": 255 - value,
        "posterize": (value >> shift) << shift,
        "solarize": jnp.where(value < int(256 * level), value, 255 - value),
        "solarize_add": jnp.where(value < 128, jnp.minimum(value + int(110 * level), 255), value),
        "brightness": blended(jnp.zeros_like(value), value, factor),
        "contrast": blended(middle, value, factor),
    }
    table = jnp.broadcast_to(value, histogram.shape)
    for name in _TABLES:
        table = jnp.where(drawn[name][:, None, None], tables[name], table)
    return table


def histograms(images: Array) -> Array:
    """Returns how often each value is in each channel: int32 [N, H, W, C] -> [N, C, 256]."""
    count, _, _, channels = images.shape
    first = 256 * (jnp.arange(count)[:, None] * channels + jnp.arange(channels))
    places = (first[:, None, None, :] + images).ravel()
    found = jnp.zeros(count * channels * 256, jnp.int32).at[places].add(1)
    return found.reshape(count, channels, 256)


def autocontrast(histogram: Array) -> Array:
    """Returns the tables that stretch the values there to 0 ... 255; one value stays as it is."""
    value = jnp.arange(256)
    there = histogram > 0
    low = jnp.argmax(there, -1, keepdims=True)
    high = 255 - jnp.argmax(there[..., ::-1], -1, keepdims=True)
    stretched = (value - low) * 255 // jnp.maximum(high - low, 1)
    return jnp.where(high > low, jnp.clip(stretched, 0, 255), value)


def equalize(histogram: Array) -> Array:
    """Returns the tables that make all values as frequent, by Pillow's arithmetic in integers."""
    value = jnp.arange(256)
    highest = 255 - jnp.argmax((histogram > 0)[..., ::-1], -1, keepdims=True)
    of_highest = jnp.take_along_axis(histogram, highest, -1)
    step = (jnp.sum(histogram, -1, keepdims=True) - of_highest) // 255
    below = jnp.cumsum(histogram, -1) - histogram
    spread = (step // 2 + below) // jnp.maximum(step, 1)
    return jnp.where(step > 0, jnp.clip(spread, 0, 255), value)


def look_up(images: Array, table: Array) -> Array:
    """Returns table[n, c, images[n, h, w, c]]."""
    count, _, _, channels = images.shape
    example, channel = jnp.arange(count)[:, None, None, None], jnp.arange(channels)
    return table[example, channel, images]


# Places ------------------------------------------------------------------------------------------


def smoothed(images: Array) -> Array:
    """Returns the mean of 3×3 pixels, the middle one five times; the border as it is."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    _, height, width, _ = images.shape
    total = 4 * images
    for row in range(3):
        for column in range(3):
            total += padded[:, row : row + height, column : column + width]
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
    inner = (rows > 0) & (rows < height - 1) & (columns > 0) & (columns < width - 1)
    return jnp.where(inner[..., None], (2 * total + 13) // 26, images)


def matrices(drawn: dict[str, Array], signs: Array, level: float, height: int, width: int) -> Array:
    """Returns, by image, the matrix [N, 2, 3] from (x, y, 1) to the place that it is read at."""
    angle = jnp.deg2rad(jnp.where(drawn["rotate"], 30 * level * signs, 0.0))
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    by_x = jnp.where(drawn["shear_x"], 0.3 * level * signs, 0.0)
    by_y = jnp.where(drawn["shear_y"], 0.3 * level * signs, 0.0)
    move_x = jnp.where(drawn["translate_x"], 100 / 224 * level * width * signs, 0.0)
    move_y = jnp.where(drawn["translate_y"], 100 / 224 * level * height * signs, 0.0)
    # About the middle; without a rotation the brackets are 0 exactly.
    x, y = width / 2, height / 2
    move_x += x * (1 - cosine) + y * sine
    move_y += y * (1 - cosine) - x * sine
    rows = [(cosine, by_x - sine, move_x), (by_y + sine, cosine, move_y)]
    return jnp.stack([jnp.stack(row, -1) for row in rows], -2)


def warp(images: Array, matrix: Array) -> Array:
    """Returns the images read where `matrix` [N, 2, 3] says, grey where that is outside.

    Places are those of pixels' middles: column i is at x = i + 1/2.
    """
    count, height, width, _ = images.shape
    y, x = jnp.meshgrid(jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing="ij")

    def read_at(row: int, length: int) -> tuple[Array, Array]:
        by_x, by_y, move = (matrix[:, row, i, None, None] for i in range(3))
        place = jnp.floor(by_x * x + by_y * y + move).astype(jnp.int32)
        return jnp.clip(place, 0, length - 1), (place >= 0) & (place < length)

    columns, inside_columns = read_at(0, width)
    rows, inside_rows = read_at(1, height)
    taken = images[jnp.arange(count)[:, None, None], rows, columns]
    return jnp.where((inside_rows & inside_columns)[..., None], taken, _GREY)
