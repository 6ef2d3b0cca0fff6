"""Augmentation as pure functions on the device: the draws depend on the key alone.

Images are standardized before they get here, so the zeros that padding and cutout bring in are the
mean colour: He et al. 2016 pad after subtracting the mean, DeVries & Taylor 2017 (arXiv:1708.04552)
mask with zeros after standardizing.
"""

import jax
import jax.numpy as jnp
from jax import Array

from normlab.data.draws import CROP, CUTOUT, FLIP


def augment(key: Array, images: Array, *, crop_padding: int, flip: bool, cutout_size: int) -> Array:
    """Returns the images [N, H, W, C], cropped, then mirrored, then cut out, each by its own draws.

    `crop_padding` and `cutout_size` are pixels; with all three off, the images as they are.
    """
    count, height, width, _ = images.shape
    rows = jnp.broadcast_to(jnp.arange(height), (count, height))
    columns = jnp.broadcast_to(jnp.arange(width), (count, width))
    if crop_padding:
        offsets = crop_offsets(jax.random.fold_in(key, CROP), count, crop_padding)
        rows, columns = rows + offsets[:, :1], columns + offsets[:, 1:]
    if flip:
        mirrored = jax.random.bernoulli(jax.random.fold_in(key, FLIP), shape=(count, 1))
        columns = jnp.where(mirrored, columns[:, ::-1], columns)
    if crop_padding or flip:
        # One gather for both: crop and flip one after the other take ten times as long on CPU.
        images = read_at(images, rows, columns)
    if cutout_size:
        centres = cutout_centres(jax.random.fold_in(key, CUTOUT), count, height, width)
        images = cutout(images, centres, cutout_size)
    return images


def crop_offsets(key: Array, count: int, padding: int) -> Array:
    """Returns (row, column) offsets of a crop from the padded image, int32 [count, 2].

    Uniform over −padding .. padding pixels: the (2·padding + 1)² places of the window.
    """
    return jax.random.randint(key, (count, 2), -padding, padding + 1)


def read_at(images: Array, rows: Array, columns: Array) -> Array:
    """Returns out[n, i, j] = images[n, rows[n, i], columns[n, j]], and zero outside the image.

    `images` [N, H, W, C], `rows` int [N, H], `columns` int [N, W].
    """
    count, height, width, _ = images.shape
    inside_rows, inside_columns = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
    inside = inside_rows[:, :, None] & inside_columns[:, None, :]
    taken = images[
        jnp.arange(count)[:, None, None],
        jnp.clip(rows, 0, height - 1)[:, :, None],
        jnp.clip(columns, 0, width - 1)[:, None, :],
    ]
    return jnp.where(inside[..., None], taken, 0)


def cutout_centres(key: Array, count: int, height: int, width: int) -> Array:
    """Returns (row, column) of each square's centre, int32 [count, 2], uniform over the pixels."""
    return jax.random.randint(key, (count, 2), 0, jnp.array([height, width]))


def cutout(images: Array, centres: Array, size: int) -> Array:
    """Returns each image [N, H, W, C] with a square of `size` pixels set to zero.

    In rows and in columns the square spans centre − size // 2 and the size − 1 pixels after it; the
    part of it outside the image is lost.
    """
    hole = rectangles(centres - size // 2, size, images.shape[1], images.shape[2])
    return jnp.where(hole[..., None], 0, images)


def rectangles(first: Array, size: Array | int, height: int, width: int) -> Array:
    """Returns bool [N, height, width], true in the `size` pixels from `first` on, in either axis.

    `first`: int [N, 2], row and column, anywhere; `size`: an int, or int [N, 2] likewise.
    """
    size = jnp.broadcast_to(jnp.asarray(size), first.shape)

    def covered(axis: int, length: int) -> Array:
        position = jnp.arange(length) - first[:, axis, None]
        return (position >= 0) & (position < size[:, axis, None])

    return covered(0, height)[:, :, None] & covered(1, width)[:, None, :]
