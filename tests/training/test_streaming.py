"""Runs on images that are decoded batch by batch: exact, resumable, the same for every variant."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from normlab.cli import main
from normlab.config import load_config
from normlab.data import random_part
from normlab.errors import UserError
from normlab.training import checkpoint, parallel
from normlab.training.examples import load_data
from normlab.training.loop import train
from normlab.training.restore import evaluate_run
from normlab.training.setup import build_parts
from normlab.training.sheet import draw_sheet, save_sheet
from normlab.training.state import create_state

FIELDS = {
    "data.name": "squares",
    "data.source": "folder",
    "data.image_size": 8,
    "data.random_resized_crop": True,
    "data.flip": True,
    "model.widths": (4, 8),
    "model.strides": (2, 2),
    "train.batch_size": 6,
    "train.num_steps": 9,
    "log.every_steps": 3,
    "eval.every_steps": 5,
    "checkpoint.every_steps": 4,
}


@pytest.fixture(scope="module")
def squares(tmp_path_factory) -> Path:
    """Dark and light images, 10 + 3 of each."""
    root, draw = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 3)):
        for label, name in enumerate(("dark", "light")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                shape = (draw.integers(10, 20), draw.integers(10, 20), 3)
                pixels = draw.integers(128 * label, 128 * label + 128, shape).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def config_of(squares: Path, norm: str = "batch_norm", **fields):
    names = {name.replace("__", "."): value for name, value in fields.items()}
    path = {"data.path": str(squares)}
    return load_config(f"configs/digits.py:norm={norm}", FIELDS | path | names)


def metrics(folder: Path) -> bytes:
    return (folder / "metrics.jsonl").read_bytes()


def final_bytes(folder: Path, config) -> list[bytes]:
    state = create_state(build_parts(config), parallel.Compiler())
    _, state, _ = checkpoint.latest(folder / "checkpoints", state, {})
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def test_a_run_cut_off_ends_with_the_bytes_of_one_that_was_not(squares, tmp_path):
    config = config_of(squares)
    result = train(config, tmp_path / "whole")
    assert result["status"] == "done"

    class Cut(Exception):
        pass

    def cut(step, _total, line):
        if step == 6 and line:
            raise Cut

    with pytest.raises(Cut):
        train(config, tmp_path / "cut", progress=cut)
    assert train(config, tmp_path / "cut")["test_accuracy"] == result["test_accuracy"]
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert final_bytes(tmp_path / "cut", config) == final_bytes(tmp_path / "whole", config)


def test_what_is_evaluated_may_have_a_size_of_its_own(squares, tmp_path):
    config = config_of(squares, data__eval_image_size=12, train__num_steps=2)
    data, rows = load_data(config, parallel.make_mesh()), np.arange(6, dtype=np.int32)
    (tested, _), _ = next(data.evaluated["test"].batches([rows]))
    (trained, _), _ = next(data.train.steps(0, 0, rows[None], 1))
    assert (tested.shape, trained.shape) == ((6, 12, 12, 3), (6, 8, 8, 3))
    result = train(config, tmp_path / "run")
    other = train(config_of(squares, train__num_steps=2), tmp_path / "other")
    assert result["train_loss"] == other["train_loss"]
    assert result["test_loss"] != other["test_loss"]
    assert evaluate_run(tmp_path / "run")["test_loss"] == result["test_loss"]
    # A sheet shows all images at the training's size.
    assert draw_sheet(config, 2, 2)[1].size == draw_sheet(config_of(squares), 2, 2)[1].size


def test_steps_in_one_dispatch_change_nothing_but_rounding(squares, tmp_path):
    one = train(config_of(squares), tmp_path / "one")
    three = train(config_of(squares, parallel__steps_per_dispatch=3), tmp_path / "three")
    assert three["test_loss"] == pytest.approx(one["test_loss"], rel=1e-4)
    assert three["steps"] == one["steps"] == 9


def test_evaluation_covers_every_image_at_any_batch_size(squares, tmp_path):
    train(config_of(squares), tmp_path / "run")
    found = [evaluate_run(tmp_path / "run", batch_size=size) for size in (1, 4, 100)]
    accuracies = {x["test_accuracy"] for x in found}
    assert len(accuracies) == 1
    assert (6 * accuracies.pop()) % 1 == pytest.approx(0, abs=1e-9)  # of 2 · 3 images


def test_variants_that_share_a_seed_see_the_same_crops(squares):
    """The parts are those of (seed, step, place), whatever the normalizer."""
    mesh, indices = parallel.make_mesh(), np.arange(12, dtype=np.int32).reshape(2, 6)

    def batches(norm, seed=0, first=0):
        feed = load_data(config_of(squares, norm), mesh).train
        return [np.asarray(data[0]) for data, _ in feed.steps(seed, first, indices, 1)]

    a, b = batches("batch_norm"), batches("layer_norm")
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, batches("batch_norm", seed=1))
    # Resumed: the second step's batch by itself is what it was behind the first.
    feed = load_data(config_of(squares), mesh).train
    [(data, rows)] = feed.steps(0, 1, indices[1:], 1)
    np.testing.assert_array_equal(data[0], a[1])
    assert rows.tolist() == [[0, 1, 2, 3, 4, 5]]
    # By hand: place 2 of step 1 is training image 8.
    path = squares / "train/dark/8.png"
    with Image.open(path) as image:
        box = random_part(0, 1, 2, (0.08, 1.0))(*image.size)
        part = image.resize((8, 8), Image.Resampling.BILINEAR, box=box)
    np.testing.assert_array_equal(a[1][2], np.asarray(part))


@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_a_run_does_not_go_on_with_other_data_and_nothing_of_it_is_touched(
    squares, tmp_path, with_checkpoint
):
    shutil.copytree(squares, tmp_path / "data")
    config = config_of(tmp_path / "data")

    class Cut(Exception):
        pass

    def cut(step, _total, line):
        if step == 6 and line:
            raise Cut

    folder = tmp_path / "run"
    with pytest.raises(Cut):
        train(config, folder, progress=cut)
    if not with_checkpoint:
        shutil.rmtree(folder / "checkpoints")
    began = json.loads((folder / "manifest.json").read_text())["data_fingerprint"][:12]
    before = contents(folder)
    (tmp_path / "data/train/dark/0.png").unlink()
    with pytest.raises(UserError) as caught:
        train(config, folder)
    message = str(caught.value)
    assert f"was made with data of fingerprint {began}, config field 'data.path' = " in message
    assert "\n" not in message
    assert contents(folder) == before
    assert before["metrics.jsonl"]
    # With the data of then it goes on to the end.
    shutil.copy(squares / "train/dark/0.png", tmp_path / "data/train/dark/0.png")
    assert train(config, folder)["steps"] == 9


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_damaged_image_ends_the_run_with_its_name(squares, tmp_path):
    shutil.copytree(squares, tmp_path / "data")
    (tmp_path / "data/train/dark/3.png").write_bytes(b"no image")
    config = config_of(tmp_path / "data")
    with pytest.raises(UserError, match=r"train/dark/3\.png' is in no format"):
        train(config, tmp_path / "run")
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["status"] == "failed"
    assert "3.png" in status["message"]


# The sheet


def test_a_sheet_has_a_row_a_class_and_says_what_the_data_are(squares, tmp_path):
    facts, sheet = draw_sheet(config_of(squares), classes=10, samples=3)
    assert facts["images"] == "20 train, 6 test"
    assert facts["classes"] == "2: dark, light"
    pixels = np.asarray(sheet)
    # 8 pixels become 64 by whole numbers; two rows under 20 pixels of heading, 4 apart.
    assert pixels.shape[0] == 20 + 2 * (64 + 4)
    dark, light = pixels[20:84, 132 : 132 + 64], pixels[88:152, 132 : 132 + 64]
    assert dark.max() <= 128 <= light.min() + 1
    path = tmp_path / "sheet.png"
    save_sheet(sheet, path)
    save_sheet(sheet, path)  # its own sheet it may replace


def test_a_picture_that_is_no_sheet_is_never_replaced(squares, tmp_path):
    _, sheet = draw_sheet(config_of(squares), classes=1, samples=1)
    for name, content in (("holiday.png", None), ("notes.txt", b"mine")):
        path = tmp_path / name
        if content is None:
            Image.new("RGB", (2, 2)).save(path)
        else:
            path.write_bytes(content)
        before = path.read_bytes()
        with pytest.raises(UserError, match=r"is there and is no sheet of samples"):
            save_sheet(sheet, path)
        assert path.read_bytes() == before


def test_every_row_has_its_test_image_where_the_last_batch_is_partial(squares, tmp_path):
    shutil.copytree(squares, tmp_path / "data")
    for name in ("1.png", "2.png"):
        (tmp_path / "data/val/light" / name).unlink()
    # Three dark test images and one light one, in batches of three: the last holds the light one.
    config = config_of(tmp_path / "data", eval__batch_size=3)
    sheet = np.asarray(draw_sheet(config, classes=2, samples=1)[1])
    light = sheet[88:152, 132 : 132 + 64]
    assert light.min() >= 127
    assert light.mean() < 250  # an empty cell is white


def test_a_sheet_is_as_wide_as_what_was_found(squares):
    # Of each class at most its ten training images: 132 for names, 1 + 10 cells, a wider gap.
    _, sheet = draw_sheet(config_of(squares), classes=2, samples=500)
    cells = (sheet.width - 132 - 3 * 4) / (64 + 4) - 1
    assert cells.is_integer()
    assert 1 <= cells <= 10


@pytest.mark.parametrize("number", [10_000, 10**30])
def test_a_sheet_too_large_is_refused_before_the_data_are_read(squares, number, monkeypatch):
    monkeypatch.setattr("normlab.training.sheet.load_data", None)
    config = config_of(squares, data__image_size=4096, train__batch_size=2)
    with pytest.raises(UserError, match=r"make a sheet of [0-9,]+×[0-9,]+ pixels; 50,000,000 is"):
        draw_sheet(config, classes=10, samples=number)


def test_where_a_sheet_cannot_be_written_is_said_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("normlab.training.sheet.draw_sheet", None)
    command = ["data", "info", "--config=configs/digits.py"]
    assert main([*command, f"--sheet={tmp_path / 'none/x.png'}"]) == 2
    assert f"there is no folder {str(tmp_path / 'none')!r}\n" in capsys.readouterr().err
    assert main([*command, f"--sheet={tmp_path}"]) == 2
    assert "is there and is no sheet of samples" in capsys.readouterr().err
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)  # a picture of more than twice that is a bomb
    Image.new("RGB", (4, 4)).save(tmp_path / "big.png")
    assert main([*command, f"--sheet={tmp_path / 'big.png'}"]) == 2
    assert "is there and is no sheet of samples" in capsys.readouterr().err


def test_the_facts_say_whose_mean_and_deviation_are_taken(squares):
    facts, _ = draw_sheet(config_of(squares), classes=1, samples=1)
    assert facts["mean"] == "0.485, 0.456, 0.406 (ImageNet's)"
    assert facts["standard deviation"].endswith("(ImageNet's)")
    facts, _ = draw_sheet(load_config("configs/digits.py"), classes=1, samples=1)
    assert facts["mean"] == "0.3058"


def test_the_sheets_images_are_those_of_the_first_steps():
    """Digits without augmentation: each image of a row is one of the class in the training set."""
    config = load_config("configs/digits.py")
    _, sheet = draw_sheet(config, classes=2, samples=2)
    data = load_data(config, parallel.make_mesh())
    images, labels = (np.asarray(x) for x in data.train.examples)
    first = np.asarray(sheet)[20:84, 132 + 64 + 16 : 132 + 64 + 16 + 64 : 1]
    small = first[::8, ::8, 0]
    assert any(np.array_equal(small, image[..., 0]) for image in images[labels == 0])
