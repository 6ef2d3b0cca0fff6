"""Crop, flip and cutout, by hand and by their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from normlab.data import augment, draws
from normlab.data.augmentation import crop_offsets, cutout, cutout_centres, read_at

KEY = jax.random.key(0)
augmented = jax.jit(augment, static_argnames=("crop_padding", "flip", "cutout_size"))


def ramp(count: int, height: int, width: int, channels: int = 1) -> Array:
    """Images of 1, 2, 3, ...: no value twice, none zero."""
    size = count * height * width * channels
    return jnp.arange(1.0, size + 1).reshape(count, height, width, channels)


def test_reading_by_hand() -> None:
    image = ramp(1, 2, 3)  # [[1, 2, 3], [4, 5, 6]]
    # One row down, one column to the left: the second row, preceded by a column of padding.
    moved = read_at(image, jnp.array([[1, 2]]), jnp.array([[-1, 0, 1]]))
    np.testing.assert_array_equal(moved[0, :, :, 0], [[0, 4, 5], [0, 0, 0]])
    mirrored = read_at(image, jnp.array([[0, 1]]), jnp.array([[2, 1, 0]]))
    np.testing.assert_array_equal(mirrored[0, :, :, 0], [[3, 2, 1], [6, 5, 4]])


def test_a_crop_is_a_window_of_the_padded_image() -> None:
    images, padding = ramp(50, 5, 4, 2), 2
    offsets = crop_offsets(jax.random.fold_in(KEY, 1), 50, padding)
    result = augmented(KEY, images, crop_padding=padding, flip=False, cutout_size=0)
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    for n, (row, column) in enumerate(np.asarray(offsets) + padding):
        window = padded[n, row : row + 5, column : column + 4]
        np.testing.assert_array_equal(result[n], window)


def test_every_place_of_the_window_is_as_likely() -> None:
    offsets = np.asarray(crop_offsets(KEY, 9000, 1))
    # 9 places, 9000 draws: 1000 each, standard deviation √(9000 · 1/9 · 8/9) = 29.8; six of them.
    counts = np.bincount(offsets @ [3, 1] + 4, minlength=9)
    assert counts.shape == (9,)
    assert np.abs(counts - 1000).max() < 180


def test_half_of_the_images_are_mirrored_left_to_right() -> None:
    images = ramp(1000, 2, 3)
    result = augmented(KEY, images, crop_padding=0, flip=True, cutout_size=0)
    mirrored = np.all(result == images[:, :, ::-1], axis=(1, 2, 3))
    kept = np.all(result == images, axis=(1, 2, 3))
    assert np.all(mirrored ^ kept)
    assert abs(mirrored.sum() - 500) < 6 * 15.9  # √(1000 / 4) = 15.8


@pytest.mark.parametrize(
    ("centre", "size", "rows", "columns"),
    [
        ((3, 3), 2, (2, 4), (2, 4)),  # even: from centre − 1
        ((3, 3), 3, (2, 5), (2, 5)),  # odd: centred
        ((0, 5), 4, (0, 2), (3, 6)),  # rows −2 .. 1 lose two, columns 3 .. 6 lose one
        ((5, 0), 20, (0, 6), (0, 6)),  # larger than the image
    ],
)
def test_cutout_by_hand(
    centre: tuple[int, int], size: int, rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    expected = np.ones((1, 6, 6, 2))
    expected[:, slice(*rows), slice(*columns)] = 0
    result = cutout(jnp.ones((1, 6, 6, 2)), jnp.array([centre]), size)
    np.testing.assert_array_equal(result, expected)


def test_centres_are_anywhere_in_the_image() -> None:
    centres = np.asarray(cutout_centres(KEY, 2000, 3, 5))
    assert {tuple(centre) for centre in centres.tolist()} == {
        (row, column) for row in range(3) for column in range(5)
    }


def test_all_off_is_the_identity() -> None:
    images = ramp(2, 3, 3)
    assert augment(KEY, images, crop_padding=0, flip=False, cutout_size=0) is images


def test_toggling_one_kind_moves_no_draw_of_another() -> None:
    images = ramp(64, 6, 6)
    crop = augmented(KEY, images, crop_padding=2, flip=False, cutout_size=0)
    both = augmented(KEY, images, crop_padding=2, flip=True, cutout_size=0)
    mirrored = np.any(
        augmented(KEY, images, crop_padding=0, flip=True, cutout_size=0) != images, axis=(1, 2, 3)
    )
    np.testing.assert_array_equal(
        both, np.where(mirrored[:, None, None, None], crop[:, :, ::-1], crop)
    )
    hole = augmented(KEY, images, crop_padding=0, flip=False, cutout_size=3) == 0
    every = augmented(KEY, images, crop_padding=2, flip=True, cutout_size=3)
    np.testing.assert_array_equal(every, np.where(hole, 0, both))


def test_the_kinds_draw_from_different_keys() -> None:
    kinds = {name: number for name, number in vars(draws).items() if name.isupper()}
    assert len(set(kinds.values())) == len(kinds) == 8


def test_the_draws_depend_on_the_key_and_not_on_the_pixels() -> None:
    images = ramp(16, 6, 6)
    options = {"crop_padding": 2, "flip": True, "cutout_size": 3}
    first = augmented(KEY, images, **options)
    np.testing.assert_array_equal(augmented(KEY, 2 * images, **options), 2 * first)
    assert np.any(augmented(jax.random.key(1), images, **options) != first)


def test_each_example_has_its_own_draws() -> None:
    same = jnp.tile(ramp(1, 6, 6), (64, 1, 1, 1))
    result = augmented(KEY, same, crop_padding=2, flip=True, cutout_size=0)
    # 25 windows, mirrored or not: 64 draws of 50 give 36 ± 3 different ones.
    assert len(np.unique(np.asarray(result).reshape(64, -1), axis=0)) > 20


def test_the_dtype_stays() -> None:
    images = ramp(2, 4, 4).astype(jnp.bfloat16)
    result = augmented(KEY, images, crop_padding=1, flip=True, cutout_size=2)
    assert result.dtype == jnp.bfloat16
