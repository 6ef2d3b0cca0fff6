"""RandAugment's operations against Pillow's, by hand where Pillow has none, and their draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from normlab.data.randaugment import OPERATIONS, distort, rand_augment

KEY = jax.random.key(0)
HEIGHT, WIDTH = 40, 48
GREY = (128, 128, 128)
jitted = jax.jit(distort, static_argnums=4)


def photographs() -> np.ndarray:
    """Four images of slow colours with some noise, one of noise, one of few values."""
    rng = np.random.default_rng(0)
    found = [rng.integers(0, 256, (HEIGHT, WIDTH, 3)), rng.integers(90, 130, (HEIGHT, WIDTH, 3))]
    for _ in range(4):
        small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        large = np.asarray(small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(int)
        found.append(large + rng.integers(-8, 9, large.shape))
    return np.clip(np.stack(found), 0, 255).astype(np.uint8)


IMAGES = photographs()


def apply(name: str, magnitude: int, sign: float = 1.0, images: np.ndarray = IMAGES) -> np.ndarray:
    count = len(images)
    operations = jnp.full(count, OPERATIONS.index(name))
    centres = jnp.broadcast_to(jnp.array([10, 12]), (count, 2))
    got = jitted(jnp.asarray(images), operations, jnp.full(count, sign), centres, magnitude)
    assert got.dtype == jnp.uint8
    return np.asarray(got).astype(int)


def by_pillow(name: str, image: Image.Image, magnitude: int, sign: float) -> Image.Image:
    m = magnitude / 10
    factor = 1.8 * m + 0.1

    def affine(*matrix: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=GREY)

    across, down = 100 / 224 * m * sign * WIDTH, 100 / 224 * m * sign * HEIGHT
    return {
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "invert": lambda: ImageOps.invert(image),
        "posterize": lambda: ImageOps.posterize(image, int(4 * m)),
        "solarize": lambda: ImageOps.solarize(image, int(256 * m)),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "color": lambda: ImageEnhance.Color(image).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
        "rotate": lambda: image.rotate(30 * m * sign, fillcolor=GREY),
        "shear_x": lambda: affine(1, 0.3 * m * sign, 0, 0, 1, 0),
        "shear_y": lambda: affine(1, 0, 0, 0.3 * m * sign, 1, 0),
        "translate_x": lambda: affine(1, 0, across, 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, down),
    }[name]()


@pytest.mark.parametrize("magnitude", [5, 15])
@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"solarize_add", "cutout"}))
def test_an_operation_is_pillows(name: str, magnitude: int) -> None:
    for sign in (1.0, -1.0):
        pillows = [by_pillow(name, Image.fromarray(image), magnitude, sign) for image in IMAGES]
        apart = np.abs(apply(name, magnitude, sign) - np.stack(pillows).astype(int))
        if name == "autocontrast":  # Pillow multiplies by 255/(high − low) in floating point
            assert apart.max() <= 1
            assert np.mean(apart > 0) < 0.001
        elif name == "rotate":  # a place on the edge of two pixels goes by the last bit
            assert np.mean(apart > 0) < 0.01
        else:
            assert apart.max() == 0


def test_a_factor_of_one_is_the_image() -> None:
    # 1.8·0.5 + 0.1 = 1.
    for name in ("brightness", "contrast", "color", "sharpness"):
        np.testing.assert_array_equal(apply(name, 5), IMAGES)


def test_solarize_add_by_hand() -> None:
    # m = 0.5: ⌊55⌋ is added to what is below 128, up to 255.
    got = apply("solarize_add", 5)
    np.testing.assert_array_equal(got, np.where(IMAGES < 128, IMAGES + 55, IMAGES))
    at_most = apply("solarize_add", 15)  # 165: 127 + 165 is cut to 255
    assert at_most[IMAGES < 128].max() == 255


def test_cutout_by_hand() -> None:
    # ⌊40·1.5·40/224⌋ = ⌊10.7⌋ = 10: rows 0 to 19 and columns 2 to 21 about (10, 12).
    expected = IMAGES.astype(int)
    expected[:, 0:20, 2:22] = 128
    np.testing.assert_array_equal(apply("cutout", 15), expected)


def test_one_value_stays_under_what_stretches_values() -> None:
    plain = np.full((1, HEIGHT, WIDTH, 3), 77, np.uint8)
    for name in ("autocontrast", "equalize"):
        np.testing.assert_array_equal(apply(name, 10, images=plain), plain)


def test_grey_images_have_no_colour() -> None:
    grey = IMAGES[..., :1]
    np.testing.assert_array_equal(apply("color", 15, images=grey), grey)
    for name in ("rotate", "equalize", "contrast", "sharpness"):
        of_grey = apply(name, 10, images=grey)
        of_three = apply(name, 10, images=np.repeat(grey, 3, -1))
        np.testing.assert_array_equal(of_grey, of_three[..., :1])


def test_each_image_has_its_own_operation_and_no_other() -> None:
    images = np.repeat(IMAGES[:1], len(OPERATIONS), 0)
    ones, centres = jnp.ones(len(OPERATIONS)), jnp.full((len(OPERATIONS), 2), 20)
    got = jitted(jnp.asarray(images), jnp.arange(len(OPERATIONS)), ones, centres, 10)
    for place, name in enumerate(OPERATIONS):
        if name != "cutout":
            np.testing.assert_array_equal(got[place], apply(name, 10, images=images[:1])[0])


@pytest.mark.slow
def test_all_operations_are_drawn_and_each_layer_draws_anew() -> None:
    images = jnp.asarray(np.repeat(IMAGES[:1, :8, :8], 256, 0))
    run = jax.jit(rand_augment, static_argnames=("layers", "magnitude"))
    one, two = (run(KEY, images, layers=n, magnitude=10) for n in (1, 2))
    # Sixteen operations, six with two directions, cutout at 64 places (a square of 2 pixels).
    different = len(np.unique(np.asarray(one).reshape(256, -1), axis=0))
    assert 20 <= different <= 15 + 5 + 64
    assert len(np.unique(np.asarray(two).reshape(256, -1), axis=0)) > different
    np.testing.assert_array_equal(run(KEY, images, layers=1, magnitude=10), one)
    assert np.any(run(jax.random.key(1), images, layers=1, magnitude=10) != one)
    np.testing.assert_array_equal(run(KEY, images, layers=0, magnitude=10), images)
