"""The real files, where the environment variable NORMLAB_DATA names the folder that holds them."""

import os
from pathlib import Path

import numpy as np
import pytest
from official import Config

from normlab.data import load
from normlab.data.archive import LAYOUTS

pytestmark = pytest.mark.data


@pytest.mark.parametrize("name", LAYOUTS)
def test_real_files_have_the_infos_moments_and_balanced_classes(name: str, archive: Config) -> None:
    root = os.environ.get("NORMLAB_DATA")
    if root is None:
        pytest.skip("NORMLAB_DATA names no folder with the real data sets")
    places = [f for each in LAYOUTS[name] for f in (each.archive, *each.folders)]
    if not any((Path(root) / place).exists() for place in places):
        pytest.skip(f"{root} holds no {name}")
    data = load(archive(name, root))
    pixels = data.train.images.reshape(-1, data.info.image_shape[2])
    levels = np.arange(256) / 255
    for channel, (mean, std) in enumerate(zip(data.info.mean, data.info.std, strict=True)):
        weights = np.bincount(pixels[:, channel], minlength=256) / len(pixels)
        center = levels @ weights
        assert center == pytest.approx(mean, abs=6e-5)
        assert np.sqrt((levels - center) ** 2 @ weights) == pytest.approx(std, abs=6e-5)
    counts = np.bincount(data.train.labels, minlength=data.info.num_classes)
    if name != "mnist":  # MNIST's classes have 5,421 to 6,742 examples
        assert np.all(counts == data.info.num_train // data.info.num_classes)
    else:
        assert (counts.min(), counts.max()) == (5421, 6742)
