"""Augmentation as pure functions on the device: the draws depend on the key alone.

Images are standardized before they get here, so the zeros that padding and cutout bring in are the
mean colour: He et al. 2016 pad after subtracting the mean, DeVries & Taylor 2017 (arXiv:1708.04552)
mask with zeros after standardizing.
"""

import jax
import jax.numpy as jnp
from jax import Array

_CROP, _FLIP, _CUTOUT = 1, 2, 3  # each kind has its own key: toggling one moves no draw of another


def augment(
    key: Array, images: Array, *, crop_padding: int, flip: bool, cutout_size: int
) -> Array:
    """Returns the images [N, H, W, C], augmented per example; as they are if all is off.

    `crop_padding` and `cutout_size` are pixels.
    """
    if crop_padding:
        images = random_crop(jax.random.fold_in(key, _CROP), images, crop_padding)
    if flip:
        images = random_flip(jax.random.fold_in(key, _FLIP), images)
    if cutout_size:
        images = cutout(jax.random.fold_in(key, _CUTOUT), images, cutout_size)
    return images


def random_crop(key: Array, images: Array, padding: int) -> Array:
    """Returns each image shifted by −padding .. padding pixels each way, zeros moving in."""
    offsets = jax.random.randint(key, (images.shape[0], 2), -padding, padding + 1)
    return shift(shift(images, offsets[:, 0], 1), offsets[:, 1], 2)


def shift(images: Array, offsets: Array, axis: int) -> Array:
    """Returns images [N, H, W, C] read at position + offset along `axis`; zero outside.

    `offsets` int [N]. A gather along one axis is several times faster on CPU than a dynamic slice
    an image.
    """
    size = images.shape[axis]
    position = jnp.arange(size) + offsets[:, None]  # [N, size]
    inside = (position >= 0) & (position < size)
    shape = [images.shape[0], 1, 1, 1]
    shape[axis] = size
    taken = jnp.take_along_axis(
        images, jnp.clip(position, 0, size - 1).reshape(shape), axis=axis
    )
    return jnp.where(inside.reshape(shape), taken, 0)


def random_flip(key: Array, images: Array) -> Array:
    """Returns each image mirrored left to right with probability one half."""
    mirrored = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def cutout(key: Array, images: Array, size: int) -> Array:
    """Returns each image with a square of `size` pixels set to zero.

    Its centre is anywhere in the image, so that part of the square may lie outside.
    """
    count, height, width, _ = images.shape
    centre = jax.random.randint(key, (count, 2), 0, jnp.array([height, width]))
    first = centre - size // 2

    def covered(axis: int, length: int) -> Array:
        position = jnp.arange(length) - first[:, axis, None]
        return (position >= 0) & (position < size)

    hole = covered(0, height)[:, :, None] & covered(1, width)[:, None, :]
    return jnp.where(hole[..., None], 0, images)
