"""The facts about data sets."""

import subprocess
import sys

import pytest

from normlab.data import DATASETS, dataset_info
from normlab.errors import UserError


def test_info_imports_nothing_heavy() -> None:
    code = "import sys, normlab.data.info; print([m for m in ('jax', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_data_set_is_named_with_its_nearest() -> None:
    with pytest.raises(UserError, match=r"^unknown data set 'cifar-10'; did you mean 'cifar10'\?$"):
        dataset_info("cifar-10")


@pytest.mark.parametrize("name", DATASETS)
def test_names_and_moments_are_one_for_each_class_and_channel(name: str) -> None:
    info = dataset_info(name)
    assert info.name == name
    assert len(set(info.class_names)) in (info.num_classes, 0)
    assert len(info.mean) == len(info.std) == info.image_shape[2]


def test_cifar10_classes_stand_in_the_official_order() -> None:
    assert dataset_info("cifar10").class_names[3] == "cat"
    assert dataset_info("cifar10").class_names[5] == "dog"
