"""Encoded images: which part is read, how it is resized, and what cannot be decoded."""

import io

import numpy as np
import pytest
from PIL import Image

from normlab.data import Encoded, central_part, prefetched, random_part
from normlab.errors import UserError


def encoded(*images: np.ndarray, form: str = "PNG") -> Encoded:
    """Images of any size with the labels 0, 1, 2, ..."""
    contents = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, form)
        contents.append(buffer.getvalue())
    return Encoded(len(contents), lambda i: (contents[i], i), lambda i: f"image {i}")


def ramp(height: int, width: int) -> np.ndarray:
    """An RGB image whose red is its column and whose green is its row."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(width), np.arange(height)[:, None]
    return image


# Parts


def test_the_central_part_is_224_of_256_pixels_of_the_shorter_side():
    # 0.875 · 256 = 224; (512 − 224) / 2 = 144 and (256 − 224) / 2 = 16.
    assert central_part(0.875)(512, 256) == (144, 16, 144 + 224, 16 + 224)
    assert central_part(1.0)(30, 20) == (5, 0, 25, 20)


def test_a_random_part_lies_inside_with_an_allowed_area_and_aspect():
    width, height = 400, 300
    parts = [random_part(0, step, 5, (0.08, 1.0))(width, height) for step in range(2000)]
    left, upper, right, lower = np.array(parts, float).T
    assert left.min() >= 0
    assert upper.min() >= 0
    assert right.max() <= width
    assert lower.max() <= height
    across, down = right - left, lower - upper
    # Sides are rounded to pixels: half a pixel of the shortest side, √(0.08 · 120000 · 3/4) = 85.
    assert np.all(across / down > 0.75 * (1 - 0.012))
    assert np.all(across / down < 4 / 3 * (1 + 0.012))
    area = across * down / (width * height)
    assert area.min() > 0.08 * (1 - 0.012)
    # Uniform in area but for what does not fit: a median near (0.08 + 1) / 2, from below.
    assert 0.4 < np.median(area) < 0.54
    assert area.max() > 0.95
    # Wherever it fits, equally likely: its middle is the image's on average (± 3 standard errors).
    assert abs((left + right).mean() / 2 - width / 2) < 3 * (left + right).std() / 2 / 2000**0.5


def test_parts_are_a_function_of_seed_step_and_place():
    def part(*key):
        return random_part(*key, (0.08, 1.0))(500, 375)

    assert part(1, 2, 3) == part(1, 2, 3)
    assert len({part(1, 2, 3), part(0, 2, 3), part(1, 0, 3), part(1, 2, 0)}) == 4


def test_an_image_too_long_for_any_part_gives_its_middle():
    # 1000 × 10: a part of 8% or more is at least √(800 · 3/4) = 24 pixels high. So the largest part
    # in the middle with an allowed aspect: 10 high and 10 · 4/3 wide.
    left, upper, right, lower = random_part(0, 0, 0, (0.08, 1.0))(1000, 10)
    assert (upper, lower) == (0, 10)
    assert right - left == pytest.approx(40 / 3)
    assert left + right == pytest.approx(1000)


def test_all_of_a_square_image_is_read_when_area_and_aspect_allow_no_less():
    parts = {random_part(0, step, 0, (1.0, 1.0))(100, 100) for step in range(50)}
    assert parts == {(0, 0, 100, 100)}  # any other aspect of the same area does not fit


# Reading


def test_the_named_part_is_what_is_read():
    images, labels = encoded(ramp(8, 8), ramp(20, 30)).cropped(
        np.array([1, 0]), [lambda w, h: (10, 4, 14, 8), lambda w, h: (0, 0, 4, 4)], (4, 4, 3), "box"
    )
    np.testing.assert_array_equal(images[0], ramp(20, 30)[4:8, 10:14])
    np.testing.assert_array_equal(images[1], ramp(8, 8)[:4, :4])
    assert labels.tolist() == [1, 0]


def test_shrinking_averages_all_the_pixels():
    # By a box of 2 × 2 the columns 0..7 become 0.5, 2.5, 4.5, 6.5, rounded up: 1, 3, 5, 7.
    images, _ = encoded(ramp(8, 8)).cropped(np.array([0]), [central_part(1.0)], (4, 4, 3), "box")
    assert images[0, 0, :, 0].tolist() == [1, 3, 5, 7]


def test_images_of_one_size_are_read_whole_and_another_size_is_named():
    images, labels = encoded(ramp(4, 6), ramp(4, 6)).whole((4, 6, 3))
    np.testing.assert_array_equal(images, [ramp(4, 6)] * 2)
    assert labels.tolist() == [0, 1]
    with pytest.raises(UserError, match=r"^image 'image 1' has 5×4 pixels, not 6×4$"):
        encoded(ramp(4, 6), ramp(4, 5)).whole((4, 6, 3))


def test_grey_images_become_colour_and_the_other_way_round():
    grey = np.full((4, 4), 100, np.uint8)
    images, _ = encoded(grey).whole((4, 4, 3))
    assert np.all(images == 100)
    images, _ = encoded(np.full((4, 4, 3), 100, np.uint8)).whole((4, 4, 1))
    assert images.shape == (1, 4, 4, 1)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"<html>"])
def test_what_is_no_image_is_named(content):
    with pytest.raises(UserError, match=r"^image 'x.jpg' is in no format that Pillow reads$"):
        Encoded(1, lambda i: (content, 0), lambda i: "x.jpg").decode(0, 3)


def test_an_image_that_is_cut_off_is_named():
    buffer = io.BytesIO()
    Image.fromarray(ramp(64, 64)).save(buffer, "JPEG")
    half = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    with pytest.raises(UserError, match=r"(?i)^image 'x.jpg' cannot be decoded: .*truncated"):
        Encoded(1, lambda i: (half, 0), lambda i: "x.jpg").decode(0, 3)


def decoded(image: Image.Image, form: str = "PNG", channels: int = 3) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, form)
    images = Encoded(1, lambda i: (buffer.getvalue(), 0), lambda i: f"x.{form.lower()}")
    return np.asarray(images.decode(0, channels)[0])


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bits_of_grey_become_8(form):
    # 65535 = 257 · 255, so a value v is v / 257, rounded: 128 / 257 < 1/2 < 129 / 257.
    values = np.array([[0, 128, 129, 257, 25700, 65535]], np.uint16)
    for channels in (1, 3):
        pixels = decoded(Image.fromarray(values), form, channels)
        assert pixels.reshape(6, -1)[:, 0].tolist() == [0, 0, 1, 1, 100, 255]


@pytest.mark.parametrize(("dtype", "mode"), [(np.float32, "F"), (np.int32, "I")])
def test_a_mode_of_unknown_range_is_refused_with_its_file(dtype, mode):
    with pytest.raises(UserError, match=rf"^image 'x.tiff' has mode '{mode}', whose range is unkn"):
        decoded(Image.fromarray(np.ones((4, 4), dtype)), "TIFF")


def test_transparent_pixels_lie_on_white():
    # Half of red (200, 0, 0) on white: (200 + 255) / 2 and 255 / 2, to half a level.
    pixels = np.array([[[200, 0, 0, 0], [200, 0, 0, 128], [200, 0, 0, 255]]], np.uint8)
    colours = decoded(Image.fromarray(pixels))[0].tolist()
    assert colours == [[255, 255, 255], [227, 127, 127], [200, 0, 0]]
    palette = Image.new("P", (1, 1), 3)
    palette.putpalette([9] * 768)
    palette.info["transparency"] = 3
    assert decoded(palette)[0].tolist() == [[255, 255, 255]]
    wide = Image.fromarray(np.array([[512, 514]], np.uint16))  # 2 · 257 is 2 of 8 bits
    wide.info["transparency"] = 512
    assert decoded(wide, channels=1).tolist() == [[255, 2]]
    grey = np.array([[[7, 0], [7, 255]]], np.uint8)
    assert decoded(Image.fromarray(grey, "LA"), channels=1).tolist() == [[255, 7]]


def test_whatever_a_decoder_raises_the_image_is_named(monkeypatch):
    def fail(*_, **__):
        raise TypeError("an integer is required\nin line 3")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    message = r"^image 'image 0' cannot be decoded: an integer is required$"
    with pytest.raises(UserError, match=message):
        encoded(ramp(4, 4)).decode(0, 3)


@pytest.mark.parametrize("label", [-1, 2, 10**10])
def test_a_label_of_no_class_is_refused_where_it_is_read(label):
    content = encoded(ramp(4, 4)).read(0)[0]
    images = Encoded(3, lambda i: (content, label if i == 1 else 0), lambda i: f"x[{i}]", 2)
    message = rf"^image 'x\[1\]' has label {label}, not one from 0 to 1$"
    with pytest.raises(UserError, match=message):
        images.whole((4, 4, 3))
    with pytest.raises(UserError, match=message):
        images.cropped(np.array([0, 1]), [central_part(1.0)] * 2, (4, 4, 3), "box")
    with pytest.raises(UserError, match=message):
        images.select(np.array([False, True, True])).decode(0, 3)
    assert images.decode(2, 3)[1] == 0


# Prefetching


def test_prefetching_keeps_the_order_and_raises_what_a_task_raised():
    assert list(prefetched(range(100), lambda i: i * i)) == [i * i for i in range(100)]
    results = prefetched(range(3), lambda i: 1 // (1 - i))
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_no_more_is_prefetched_than_asked_for():
    begun = []
    results = prefetched(range(100), lambda i: begun.append(i), ahead=3)
    next(results)
    results.close()
    assert len(begun) <= 4
