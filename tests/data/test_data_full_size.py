"""The sizes of the official files, by hand, on sparse files of zeros that take no disk."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from official import Config

from normlab.data import check_source, load
from normlab.errors import UserError

# Records of 1 + 3 · 32 · 32 = 3,073 bytes, 10,000 a file; CIFAR-100 has a coarse label more.
CIFAR10 = {f"data_batch_{i}.bin": 30_730_000 for i in range(1, 6)} | {"test_batch.bin": 30_730_000}
CIFAR100 = {"train.bin": 153_700_000, "test.bin": 30_740_000}
# 16 bytes of header and 784 pixels an image; 8 bytes of header and one byte a label.
IDX = {
    "train-images-idx3-ubyte": (47_040_016, (2051, 60_000, 28, 28)),
    "train-labels-idx1-ubyte": (60_008, (2049, 60_000)),
    "t10k-images-idx3-ubyte": (7_840_016, (2051, 10_000, 28, 28)),
    "t10k-labels-idx1-ubyte": (10_008, (2049, 10_000)),
}


def write_zeros(path: Path, size: int, header: tuple[int, ...] = ()) -> None:
    path.write_bytes(struct.pack(f">{len(header)}i", *header))
    os.truncate(path, size)


def test_mnist_at_full_size(tmp_path: Path, archive: Config) -> None:
    for name, (size, header) in IDX.items():
        write_zeros(tmp_path / name, size, header)
    data = load(archive("mnist", tmp_path))
    assert data.train.images.shape == (60_000, 28, 28, 1)
    assert data.test.images.shape == (10_000, 28, 28, 1)
    assert data.train.images.dtype == np.uint8


def test_cifar10_at_full_size(tmp_path: Path, archive: Config) -> None:
    for name, size in CIFAR10.items():
        write_zeros(tmp_path / name, size)
    data = load(archive("cifar10", tmp_path))
    assert data.train.images.shape == (50_000, 32, 32, 3)
    assert data.test.images.shape == (10_000, 32, 32, 3)
    assert data.train.images.nbytes == 153_600_000  # uint8, as on disk


@pytest.mark.parametrize(("name", "sizes"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_one_byte_less_is_named_with_both_sizes(
    name: str, sizes: dict[str, int], tmp_path: Path, archive: Config
) -> None:
    for file, size in sizes.items():
        write_zeros(tmp_path / file, size)
    check_source(archive(name, tmp_path))
    last, size = list(sizes.items())[-1]
    os.truncate(tmp_path / last, size - 1)
    with pytest.raises(UserError) as caught:
        check_source(archive(name, tmp_path))
    assert str(caught.value).endswith(f"{last}' has {size - 1:,} bytes, not {size:,}")
