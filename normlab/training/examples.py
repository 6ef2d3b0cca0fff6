"""A run's data as its steps get it: whole on every device, or batch by batch.

Either kind gives pairs (examples, rows): arrays on the devices, and the places in them of the
examples that are meant. Of data in memory the arrays are always the same; of encoded images they
are the batch itself, made by threads while the devices compute. Where several processes share a
batch, it is always the batch itself, and each process decodes and puts on its devices its own rows
alone.
"""

import dataclasses
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from normlab.data import (
    AnySplit,
    Arranged,
    DatasetInfo,
    Encoded,
    Examples,
    Split,
    central_part,
    evaluated,
    hold_out,
    load,
    prefetched,
    random_part,
)
from normlab.training import parallel

Batch = tuple[Examples, np.ndarray]  # the rows: int32 [B], or [steps, B] to train on


class Feed(Protocol):
    """The examples of a split."""

    def __len__(self) -> int: ...

    def batches(self, indices: Iterable[np.ndarray]) -> Generator[Batch]:
        """Yields the batch of each `indices`, int32 [B], as it is evaluated."""

    def steps(self, seed: int, first: int, indices: np.ndarray, together: int) -> Generator[Batch]:
        """Yields what the steps from `first` are trained on, `indices` int32 [steps, B].

        So many steps `together`, what is left one by one.
        """


@dataclasses.dataclass(frozen=True)
class Resident:
    """Examples that are on the devices as a whole."""

    examples: Examples

    def __len__(self) -> int:
        return len(self.examples[1])

    def batches(self, indices: Iterable[np.ndarray]) -> Generator[Batch]:
        """Yields the batch of each `indices`, int32 [B]."""
        return ((self.examples, rows) for rows in indices)

    def steps(self, seed: int, first: int, indices: np.ndarray, together: int) -> Generator[Batch]:
        """Yields what the steps are trained on; `seed` and `first` are of no account."""
        return ((self.examples, indices[chosen]) for chosen in _chunks(len(indices), together))


@dataclasses.dataclass(frozen=True)
class Held:
    """Examples in the memory of each of several processes; its own rows go onto its devices."""

    split: Split
    mesh: Mesh

    def __len__(self) -> int:
        return len(self.split)

    def batches(self, indices: Iterable[np.ndarray]) -> Generator[Batch]:
        """Yields the batch of each `indices`, int32 [B]."""
        for rows in indices:
            own = _own(len(rows), self.mesh)
            mine = self.split.images[rows[own]], self.split.labels[rows[own]]
            yield _arranged(*mine, own.stop - own.start, self.mesh), rows

    def steps(self, seed: int, first: int, indices: np.ndarray, together: int) -> Generator[Batch]:
        """Yields what the steps are trained on, one at a time."""
        return ((batch, rows[None]) for batch, rows in self.batches(indices))


@dataclasses.dataclass(frozen=True)
class Streamed:
    """Encoded images, decoded and cropped as they are asked for."""

    images: Encoded
    info: DatasetInfo
    config: Any  # config.data
    mesh: Mesh

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, indices: Iterable[np.ndarray]) -> Generator[Batch]:
        """Yields the batch of each `indices`, int32 [B]: the middle of each image."""
        middle = central_part(self.config.eval_crop)

        def decode(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
            mine = rows[_own(len(rows), self.mesh)]
            return *self._cropped(mine, [middle] * len(mine)), len(rows)

        for images, labels, count in prefetched(indices, decode):
            own = _own(count, self.mesh)
            places = np.arange(count, dtype=np.int32)
            yield _arranged(images, labels, own.stop - own.start, self.mesh), places

    def steps(self, seed: int, first: int, indices: np.ndarray, together: int) -> Generator[Batch]:
        """Yields what the steps are trained on: a random part of each image, if so configured.

        On several devices one step at a time, each device getting the images that it works on.
        """
        middle = central_part(self.config.eval_crop)
        area = self.config.crop_area if self.config.random_resized_crop else None
        together = together if self.mesh.size == 1 else 1

        own = _own(indices.shape[1], self.mesh)

        def decode(chosen: slice) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
            mine = indices[chosen, own]
            parts = [
                random_part(seed, first + chosen.start + step, own.start + place, area)
                if area
                else middle
                for step, place in np.ndindex(mine.shape)
            ]
            return *self._cropped(mine.ravel(), parts), indices[chosen].shape

        for images, labels, shape in prefetched(_chunks(len(indices), together), decode):
            batch = _arranged(images, labels, shape[0] * (own.stop - own.start), self.mesh)
            places = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
            yield batch if shape[0] == 1 else (batch.images, batch.labels), places

    def _cropped(self, rows: np.ndarray, parts: Any) -> tuple[np.ndarray, np.ndarray]:
        return self.images.cropped(rows, parts, self.info.image_shape, self.config.interpolation)


def _own(count: int, mesh: Mesh) -> slice:
    """Returns which rows of a batch of `count` this process has, those of padding behind it too."""
    return parallel.own_rows(parallel.splittable(count, mesh), mesh)


def _arranged(images: np.ndarray, labels: np.ndarray, size: int, mesh: Mesh) -> Arranged:
    """Returns a batch of which this process has these rows, padded to `size`, on the devices."""

    def padded(array: np.ndarray) -> np.ndarray:
        return np.pad(array, [(0, size - len(array))] + [(0, 0)] * (array.ndim - 1))

    return Arranged(*parallel.put_rows((padded(images), padded(labels)), mesh))


def _chunks(count: int, together: int) -> Iterator[slice]:
    """Yields slices of `together` steps, and of one step for each that is left."""
    whole = count - count % together
    yield from (slice(i, i + together) for i in range(0, whole, together))
    yield from (slice(i, i + 1) for i in range(whole, count))


@dataclasses.dataclass(frozen=True)
class RunData:
    """The examples that a run trains on, and those it is evaluated on, by split."""

    train: Feed
    evaluated: Mapping[str, Feed]  # "validation", if any are held out, and "test"
    fingerprint: str  # of the whole data set


def load_data(config: ConfigDict, mesh: Mesh) -> RunData:
    """Reads `config.data`; raises UserError, one line, as `data.load` does."""
    data = load(config.data)
    train, validation = hold_out(data.train, config.data.num_validation)

    def feed(split: AnySplit, info: DatasetInfo) -> Feed:
        if isinstance(split, Encoded):
            return Streamed(split, info, config.data, mesh)
        if mesh.is_multi_process:
            return Held(split, mesh)
        return Resident(parallel.replicate((split.images, split.labels), mesh))

    info = evaluated(data.info, config.data)
    feeds = {"test": feed(data.test, info)}
    if validation is not None:
        feeds = {"validation": feed(validation, info), **feeds}
    return RunData(feed(train, data.info), feeds, data.fingerprint)
