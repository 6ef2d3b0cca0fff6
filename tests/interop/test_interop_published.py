"""`normlab import`: a new folder, which `normlab eval` reads and `normlab train` does not."""

import jax
import numpy as np
import pytest
from test_interop_timm import RESNET, nf_resnet26, packed

from normlab.cli import main
from normlab.config import load_config
from normlab.data import load
from normlab.interop import timm
from normlab.models import build
from normlab.training.restore import restore

SOURCE = "configs/digits.py:model=nf_resnet26"
FIELDS = RESNET | {"model.stage_sizes": (1, 1, 1, 1)}


def choices(**changes):
    """The command's arguments for timm's net, some fields otherwise."""
    fields = FIELDS | {name.replace("__", "."): value for name, value in changes.items()}
    listed = [f"--config.{name}={value}" for name, value in fields.items()]
    return [f"--config={SOURCE}", *(part.replace("=None", "=none") for part in listed)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed(nf_resnet26(channels=1, blocks=1)))
    return path


@pytest.mark.slow
def test_what_was_imported_is_evaluated(file, tmp_path, capsys):
    folder = tmp_path / "imported"
    assert main(["import", "timm", str(file), *choices(), f"--workdir={folder}"]) == 0
    config = load_config(SOURCE, FIELDS)
    variables = timm.load(file, config)
    count = sum(value.size for value in jax.tree.leaves(variables))
    assert f"{count:,} parameters of nf_resnet26 in {folder}" in capsys.readouterr().out

    _, step, state = restore(folder, None)
    assert step == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, variables["params"])

    assert main(["eval", str(folder)]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    data = load(config.data)
    mean, std = (np.asarray(part, "f4") for part in (data.info.mean, data.info.std))
    images = (np.asarray(data.test.images, "f4") / 255 - mean) / std
    model = build(config)
    logits = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    accuracy = float(np.mean(np.argmax(np.asarray(logits), -1) == np.asarray(data.test.labels)))
    assert float(printed["test_accuracy"]) == pytest.approx(accuracy, abs=1e-5)


def test_training_does_not_go_on_from_it(file, tmp_path, capsys):
    folder = tmp_path / "imported"
    main(["import", "timm", str(file), *choices(), f"--workdir={folder}"])
    before = {path for path in folder.rglob("*")}
    assert main(["train", *choices(), f"--workdir={folder}"]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert {path for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("source", "arguments", "expected"),
    [
        ("tim", choices(), "unknown source of weights 'tim'; did you mean 'timm'?"),
        ("timm", [f"--config={SOURCE}"], "config field 'conv.epsilon' = 0.0001"),
        ("timm", choices(model__width=8), "'stem.conv.bias' has shape (4,), not (8,)"),
        ("deepmind-nfnets", choices(), "unknown model of DeepMind's files: 'nf_resnet26'"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    file, tmp_path, capsys, source, arguments, expected
):
    folder = tmp_path / "imported"
    assert main(["import", source, str(file), *arguments, f"--workdir={folder}"]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1
    assert not folder.exists()


def test_a_folder_that_exists_is_left_alone(file, tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("keep")
    assert main(["import", "timm", str(file), *choices(), f"--workdir={folder}"]) == 2
    assert "exists; choose a new folder" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
