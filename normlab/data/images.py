"""Images of any size: encoded bytes, decoded and cropped by Pillow when a batch asks for them.

Which part of an image is read is a function of (seed, step, place in the batch), so a resumed run
sees what it would have seen, and all variants of a seed see the same.
"""

import dataclasses
import io
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from normlab.environment import threads
from normlab.errors import UserError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

Task = TypeVar("Task")
Result = TypeVar("Result")

Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels of the image
Part = Callable[[int, int], Box]  # (width, height) -> the part of the image that is read

INTERPOLATIONS = ("bilinear", "bicubic", "lanczos", "box", "nearest")
CROP_ASPECT = (3 / 4, 4 / 3)  # width over height of a random part
CROP_ATTEMPTS = 10
BATCHES_AHEAD = 4


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Images as encoded bytes (JPEG, PNG, ...) that are read one by one."""

    count: int
    read: Callable[[int], tuple[bytes, int]]  # example i and its label; called from several threads
    name: Callable[[int], str]  # of example i, for messages
    num_classes: int | None = None  # None: what the labels may be is not known yet

    def __len__(self) -> int:
        return self.count

    def select(self, chosen: np.ndarray) -> "Encoded":
        """Returns the examples that are true in `chosen`, bool [N], in their order."""
        places = np.flatnonzero(chosen).tolist()
        return dataclasses.replace(
            self,
            count=len(places),
            read=lambda i: self.read(places[i]),
            name=lambda i: self.name(places[i]),
        )

    def decode(self, i: int, channels: int) -> tuple["Image", int]:
        """Returns (image i, whole, its label).

        Transparent pixels lie on white. Raises UserError, naming the image, if it is damaged, of a
        kind whose range is unknown (floating point), or its label is of no class.
        """
        from PIL import Image, UnidentifiedImageError

        try:
            content, label = self.read(i)
            with Image.open(io.BytesIO(content)) as image:
                eight_bit = _eight_bit(image)
                if eight_bit is not None:
                    eight_bit = eight_bit.convert("L" if channels == 1 else "RGB")
        except (UserError, MemoryError):
            raise
        except UnidentifiedImageError as error:
            raise UserError(f"image {self.name(i)!r} is in no format that Pillow reads") from error
        except Exception as error:  # damaged bytes make decoders raise anything
            raise UserError(
                f"image {self.name(i)!r} cannot be decoded: {one_line(error)}"
            ) from error
        if eight_bit is None:
            raise UserError(
                f"image {self.name(i)!r} has mode {image.mode!r}, whose range is unknown; convert "
                "it to 8 bits"
            )
        if self.num_classes is not None and not 0 <= label < self.num_classes:
            raise UserError(
                f"image {self.name(i)!r} has label {label}, not one from 0 to "
                f"{self.num_classes - 1}"
            )
        return eight_bit, label

    def whole(self, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns all of (images uint8 [N, *shape], labels int32 [N]).

        Raises UserError for an image of another size.
        """
        height, width, channels = shape

        def load(i: int) -> tuple[np.ndarray, int]:
            image, label = self.decode(i, channels)
            if image.size != (width, height):
                raise UserError(
                    f"image {self.name(i)!r} has {image.width}×{image.height} pixels, "
                    f"not {width}×{height}"
                )
            return np.asarray(image, np.uint8).reshape(shape), label

        images, labels = np.empty((self.count, *shape), np.uint8), np.empty(self.count, np.int32)
        for i, (image, label) in enumerate(prefetched(range(self.count), load, ahead=1024)):
            images[i], labels[i] = image, label
        return images, labels

    def cropped(
        self,
        indices: np.ndarray,
        parts: Iterable[Part],
        shape: tuple[int, int, int],
        interpolation: str,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns (images uint8 [B, *shape], labels int32 [B]) of `indices`, int [B].

        Of each image the part that `parts` names is resized; where it shrinks, the filter widens
        with it (Pillow's resampling), so nothing is aliased.
        """
        from PIL import Image

        height, width, channels = shape
        filter = Image.Resampling[interpolation.upper()]
        images = np.empty((len(indices), *shape), np.uint8)
        labels = np.empty(len(indices), np.int32)
        for place, (i, part) in enumerate(zip(indices.tolist(), parts, strict=True)):
            image, labels[place] = self.decode(i, channels)
            resized = image.resize((width, height), filter, box=part(*image.size))
            images[place] = np.asarray(resized, np.uint8).reshape(shape)
        return images, labels


_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr")


def _eight_bit(image: "Image") -> "Image | None":
    """Returns an image in 8 bits and without transparency; None if its range is unknown.

    16 bits of grey become 8: 65535 = 257 · 255. (Pillow alone would make 255 of all above 255.)
    """
    from PIL import Image

    # Pillow may read 16 bits of grey as 32; in other formats 32 bits may mean anything.
    is_wide = image.mode == "I" and image.format in ("PNG", "PPM")
    if is_wide or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if "transparency" in image.info:  # the one value that is transparent
            values = np.where(values == image.info["transparency"], 65535, values)
        return Image.fromarray(((np.clip(values, 0, 65535) + 128) // 257).astype(np.uint8))
    if image.mode not in _EIGHT_BIT_MODES:
        return None
    if not image.has_transparency_data:
        return image
    # What lies under transparent pixels is anything: leftovers of editing, mostly black.
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA"))


def central_part(fraction: float) -> Part:
    """Returns the square in the middle whose side is `fraction` of the image's shorter side.

    As resizing the shorter side to 256 and cropping 224 pixels, for 224/256 = 0.875, in one step.
    """

    def part(width: int, height: int) -> Box:
        side = fraction * min(width, height)
        left, upper = (width - side) / 2, (height - side) / 2
        return left, upper, left + side, upper + side

    return part


def random_part(seed: int, step: int, place: int, area: tuple[float, float]) -> Part:
    """Returns a random part: `area` of the image, width over height from 3/4 to 4/3.

    Szegedy et al. 2015 (arXiv:1409.4842, section 6): "8% to 100% of the image area", the aspect
    ratio here uniform in its logarithm, as in torchvision's RandomResizedCrop. An attempt that does
    not fit is drawn again; after ten, the largest part in the middle with an allowed aspect.
    """
    # A counter of its own beside the data order's, which has the same kind of key.
    raw = np.random.Philox(key=[seed, step], counter=[0, place + 1, 0, 0]).random_raw(
        4 * CROP_ATTEMPTS
    )
    draws = (raw >> np.uint64(11)) * 2.0**-53  # uniform in [0, 1)

    def part(width: int, height: int) -> Box:
        low, high = (math.log(aspect) for aspect in CROP_ASPECT)
        for in_area, in_aspect, in_left, in_upper in draws.reshape(-1, 4).tolist():
            pixels = width * height * (area[0] + (area[1] - area[0]) * in_area)
            aspect = math.exp(low + (high - low) * in_aspect)
            across, down = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
            if 0 < across <= width and 0 < down <= height:
                left = int(in_left * (width - across + 1))
                upper = int(in_upper * (height - down + 1))
                return left, upper, left + across, upper + down
        return _largest_part(width, height)

    return part


def _largest_part(width: int, height: int) -> Box:
    """Returns the largest part in the middle with an allowed aspect."""
    across, down = min(width, height * CROP_ASPECT[1]), min(height, width / CROP_ASPECT[0])
    left, upper = (width - across) / 2, (height - down) / 2
    return left, upper, left + across, upper + down


def prefetched(
    tasks: Iterable[Task], load: Callable[[Task], Result], ahead: int = BATCHES_AHEAD
) -> Iterator[Result]:
    """Yields load(task) of each task in order; up to `ahead` are under way in threads.

    Pillow decodes outside the interpreter's lock. A task that raises raises here.
    """
    waiting: deque[Any] = deque()
    with ThreadPoolExecutor(max(threads(), 1)) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(load, task))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
