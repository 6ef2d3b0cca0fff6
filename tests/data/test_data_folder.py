"""Class folders: their layout, what a model gets of them, and what is refused."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from official import data_config
from PIL import Image

from normlab.cli import main
from normlab.data import Encoded, check_cropping, describe, hold_out, load
from normlab.data.info import DATASETS
from normlab.data.verify import verify
from normlab.errors import UserError


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """cat: 3 + 1 images, dog: 2 + 2, of several sizes and formats; a hidden file; a readme."""
    draw = np.random.default_rng(0)
    for name, shape in {
        "train/cat/b.jpg": (20, 30),
        "train/cat/a.png": (25, 25),
        "train/cat/deep/c.JPEG": (40, 20),
        "train/dog/1.png": (16, 16),
        "train/dog/2.bmp": (18, 16),
        "val/cat/1.png": (16, 16),
        "val/dog/1.png": (17, 16),
        "val/dog/2.png": (16, 17),
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (*shape, 3), np.uint8)).save(path)
    (tmp_path / "train/cat/.hidden.png").write_bytes(b"")
    (tmp_path / "train/cat/readme.txt").write_text("cats")
    return tmp_path


def config(path: Path | None, **fields):
    named = {"name": "pets", "source": "folder", "path": None if path is None else str(path)}
    return data_config(**(named | fields))


def refused(*arguments, **fields) -> str:
    with pytest.raises(UserError) as caught:
        load(config(*arguments, **fields))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_labels_are_the_places_of_the_sorted_class_names(pets):
    data = load(config(pets))
    assert data.info.class_names == ("cat", "dog")
    assert (data.info.num_train, data.info.num_test) == (5, 3)
    assert isinstance(data.train, Encoded)
    assert [data.train.read(i)[1] for i in range(5)] == [0, 0, 0, 1, 1]
    names = [Path(data.train.name(i)).relative_to(pets).as_posix() for i in range(5)]
    # Sorted within a class, whatever order the disk has; no hidden file and no text.
    assert names == [
        "train/cat/a.png",
        "train/cat/b.jpg",
        "train/cat/deep/c.JPEG",
        "train/dog/1.png",
        "train/dog/2.bmp",
    ]


def test_the_shape_is_the_configs_and_224_without(pets):
    assert describe(config(pets)).image_shape == (224, 224, 3)
    assert describe(config(pets, image_size=32)).image_shape == (32, 32, 3)


def test_the_fingerprint_changes_with_names_and_sizes(pets):
    before = load(config(pets)).fingerprint
    assert load(config(pets)).fingerprint == before
    (pets / "train/dog/2.bmp").rename(pets / "train/dog/3.bmp")
    after = load(config(pets)).fingerprint
    assert after != before
    with (pets / "val/cat/1.png").open("ab") as file:
        file.write(b"\0")
    assert load(config(pets)).fingerprint not in (before, after)


def test_a_new_image_is_seen_in_the_same_process(pets):
    assert describe(config(pets)).num_train == 5
    (pets / "train/dog/1.png").rename(pets / "val/dog/3.png")
    info = describe(config(pets))
    assert (info.num_train, info.num_test) == (4, 4)


def test_held_out_images_and_the_rest_are_the_training_set(pets):
    train, validation = hold_out(load(config(pets)).train, 2)
    names = [split.name(i) for split in (train, validation) for i in range(len(split))]
    assert (len(train), len(validation), len(set(names))) == (3, 2, 5)


def test_a_test_folder_comes_before_val_where_it_has_classes(pets):
    (pets / "test").mkdir()
    assert load(config(pets)).info.num_test == 3  # empty: as ImageNet's without labels
    for name in ("cat", "dog"):
        (pets / "test" / name).mkdir()
        (pets / "train" / name / "x.png").write_bytes((pets / "val/cat/1.png").read_bytes())
        (pets / "test" / name / "x.png").write_bytes((pets / "val/cat/1.png").read_bytes())
    assert load(config(pets)).info.num_test == 2


def test_what_has_not_the_layout_is_refused(pets, tmp_path):
    field = "config field 'data.path'"
    assert refused(None).startswith(("unknown data set 'pets'", f"{field} is not set"))
    assert refused(pets / "none") == f"{field} = {str(pets / 'none')!r} does not exist"
    file = pets / "train/cat/readme.txt"
    assert refused(file) == f"{field} = {str(file)!r} is not a folder"
    assert "has no folder 'train'" in refused(pets / "val")
    (pets / "val/dog").rename(pets / "val/dgo")
    assert refused(pets).endswith("class 'dgo' is in 'val' and not in 'train'")
    (pets / "val/dgo").rename(pets / "val/dog")
    for image in (pets / "val/cat").iterdir():
        image.unlink()
    assert refused(pets) == f"class folder {str(pets / 'val/cat')!r} has no image"


def test_other_classes_than_a_known_data_sets_are_refused(pets):
    assert refused(pets, name="imagenette").startswith("config field 'data.path' = ")
    assert "holds 2 classes, 'imagenet' has 1000" in refused(pets, name="imagenet")


def test_fields_that_do_not_fit_are_refused(pets):
    assert "'data.binarize' = true: 'pets' is not in memory" in refused(pets, binarize=True)
    with pytest.raises(UserError, match=r"'data.image_size' = 9: the images of 'digits' have a"):
        describe(data_config(image_size=9))


@pytest.mark.parametrize("target", [".", "..", "../..", "../../dog"])
def test_a_link_that_leads_back_is_named_and_not_followed(pets, target):
    link = pets / "train/cat/loop"
    link.symlink_to(target if target != "../../dog" else pets / "train/dog")
    if target == "../../dog":  # through another class's link back to the first
        (pets / "train/dog/back").symlink_to(pets / "train/cat")
        assert refused(pets).endswith("is a link to a folder that it lies in")
        return
    assert refused(pets) == f"{str(link)!r} is a link to a folder that it lies in"


def test_a_link_to_images_elsewhere_is_followed(pets, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (pets / "val/cat/1.png").rename(elsewhere / "1.png")
    (pets / "val/cat").rmdir()
    (pets / "val/cat").symlink_to(elsewhere)
    assert load(config(pets)).info.num_test == 3


def test_names_that_are_no_utf_8_are_read_and_shown(pets, capsys):
    name = os.fsdecode(b"caf\xe9")
    for split in ("train", "val"):
        (pets / split / "dog").rename(pets / split / name)
    (pets / "train/cat/a.png").rename(pets / "train/cat" / f"{name}.png")
    data = load(config(pets))
    assert data.info.class_names == ("caf\udce9", "cat")
    assert data.train.decode(2, 3)[1] == 1
    (pets / f"train/cat/{name}.png").write_bytes(b"none")
    assert main(["data", "verify", "pets", f"--path={pets}"]) == 2
    assert "caf\\udce9.png' is in no format" in capsys.readouterr().out


def test_a_crop_of_next_to_nothing_is_refused():
    for area in ((1e-9, 1e-9), (0.0, 1.0), (0.5, 0.4)):
        with pytest.raises(UserError, match=r"'data.crop_area' = .* area, 0.0001 or more, the sm"):
            check_cropping(data_config(crop_area=area))
    check_cropping(data_config(crop_area=(1e-4, 1.0)))


def test_verify_names_the_image_that_cannot_be_decoded(pets):
    assert not any(found.fault for found in verify("pets", "folder", str(pets)))
    content = (pets / "train/cat/b.jpg").read_bytes()[:200]
    (pets / "train/cat/b.jpg").write_bytes(content)
    [wrong] = [found for found in verify("pets", "folder", str(pets)) if found.fault]
    assert wrong.file == str(pets / "train/cat/b.jpg")
    assert wrong.size == 200
    assert len(wrong.md5) == 32
    assert wrong.file in wrong.fault
    *_, train, test = verify("pets", "folder", str(pets))
    assert (train.note, train.verdict) == (
        "5 images in 2 classes, each decoded; 1 of them wrong",
        "",
    )
    assert (test.note, test.verdict) == ("3 images in 2 classes, each decoded", "ok")


def test_a_part_of_a_known_data_set_is_called_a_part(pets, capsys, monkeypatch):
    whole = dataclasses.replace(describe(config(pets)), num_train=9469, num_test=3)
    monkeypatch.setitem(DATASETS, "pets", whole)
    assert main(["data", "verify", "pets", f"--path={pets}"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "pets (folder): nothing is wrong with what is there; 5 of 9,469 training images"
    )
    monkeypatch.setitem(DATASETS, "pets", describe(config(pets)))
    assert main(["data", "verify", "pets", f"--path={pets}"]) == 0
    assert capsys.readouterr().out.endswith("pets (folder): nothing is wrong\n")


def test_the_command_refuses_another_data_sets_folder(pets, capsys):
    assert main(["data", "verify", "imagenet", f"--path={pets}"]) == 2
    assert capsys.readouterr().err.endswith("holds 2 classes, 'imagenet' has 1000\n")
    assert main(["data", "verify", "pets", f"--path={pets}"]) == 0
    assert "5 images in 2 classes, each decoded" in capsys.readouterr().out
