"""The interface of the sources, and scikit-learn's digits."""

import subprocess
import sys

import numpy as np
import pytest
from official import data_config
from sklearn.datasets import load_digits

from normlab.data import Dataset, check_source, dataset_info, hold_out, load
from normlab.errors import UserError

DIGITS = data_config()


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load(DIGITS)


def test_digits_have_the_shapes_of_their_info(digits: Dataset) -> None:
    for split, count in ((digits.train, 1437), (digits.test, 360)):
        assert split.images.shape == (count, 8, 8, 1)
        assert split.images.dtype == np.uint8
        assert split.labels.shape == (count,)
        assert split.labels.dtype == np.int32
    assert digits.info is dataset_info("digits")


def test_the_17_grey_levels_are_spread_over_0_to_255(digits: Dataset) -> None:
    levels = np.unique(digits.train.images)
    assert len(levels) == 17
    assert levels[[0, 4, 16]].tolist() == [0, 64, 255]  # 4 / 16 · 255 = 63.75
    np.testing.assert_array_equal(np.round(levels / 255 * 16), np.arange(17))


def test_the_two_splits_are_all_of_scikit_learns_digits(digits: Dataset) -> None:
    def rows(images: np.ndarray, labels: np.ndarray) -> list[bytes]:
        flat = np.round(images.reshape(len(images), -1) / images.max() * 16).astype(np.uint8)
        return [row.tobytes() for row in np.column_stack([flat, labels.astype(np.uint8)])]

    ours = rows(digits.train.images, digits.train.labels)
    ours += rows(digits.test.images, digits.test.labels)
    assert sorted(ours) == sorted(rows(*load_digits(return_X_y=True)))


def test_every_class_gives_a_fifth_to_the_test_split(digits: Dataset) -> None:
    train, test = np.bincount(digits.train.labels), np.bincount(digits.test.labels)
    # Every fifth of n examples, from wherever the count stands: n / 5 rounded down or up.
    assert np.all(np.abs(test - (train + test) / 5) < 1)


def test_the_infos_moments_are_those_of_the_training_pixels(digits: Dataset) -> None:
    pixels = digits.train.images / 255
    np.testing.assert_allclose(pixels.mean(), digits.info.mean[0], atol=5e-5)
    np.testing.assert_allclose(pixels.std(), digits.info.std[0], atol=5e-5)


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_in_memory_that_is_of_no_class_is_refused(monkeypatch, label: int) -> None:
    pixels, labels = load_digits(return_X_y=True)
    labels[5] = label  # the first training image: each class's first is a test image
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda **_: (pixels, labels))
    with pytest.raises(UserError, match=rf"label {label} is not one from 0 to 9$"):
        load(DIGITS)


def test_the_fingerprint_is_pinned(digits: Dataset) -> None:
    # A change of the split, the scaling or the digest makes runs incomparable with earlier ones.
    assert digits.fingerprint == "c199e77b7d21af4b41671570a43a77e2841259af1d9a7c57c248d034375cecf0"


def test_scikit_learn_is_imported_only_to_load_digits() -> None:
    code = "import sys, normlab.data.sources; print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "digit"}, r"unknown data set 'digit'; did you mean 'digits'\?"),
        ({"source": "sklaern"}, r"unknown 'data.source' 'sklaern'; did you mean 'sklearn'\?"),
        ({"name": "mnist"}, r"data set 'mnist' does not come with scikit-learn; use --config.*"),
        ({"path": "x"}, r"config field 'data.path' = 'x': source 'sklearn' reads no file"),
        ({"source": "archive"}, r"data set 'digits' has no archive; use --config.*=sklearn"),
    ],
)
def test_a_source_that_does_not_fit_is_refused_before_loading(
    fields: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=rf"^{message}$"):
        check_source(data_config(**fields))


# Validation --------------------------------------------------------------------------------------


def test_held_out_examples_and_the_rest_are_the_training_set(digits):
    train, validation = hold_out(digits.train, 137)
    assert (len(train.labels), len(validation.labels)) == (1437 - 137, 137)

    def multiset(*splits):
        images = np.concatenate([split.images.reshape(len(split.labels), -1) for split in splits])
        return sorted(image.tobytes() for image in images)

    assert multiset(train, validation) == multiset(digits.train)
    again = hold_out(digits.train, 137)[1]
    np.testing.assert_array_equal(again.images, validation.images)
    # A larger share holds out the same ones and more.
    larger = multiset(hold_out(digits.train, 200)[1])
    assert set(multiset(validation)) <= set(larger)


def test_nothing_is_held_out_by_default(digits):
    train, validation = hold_out(digits.train, 0)
    assert train is digits.train
    assert validation is None
