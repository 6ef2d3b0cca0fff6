"""Values that are not numbers: they cannot come in by the data, and end no run unnoticed."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from fault_tools import lines, small
from PIL import Image

from normlab.cli import main
from normlab.config import load_config
from normlab.data import load
from normlab.errors import UserError
from normlab.training import step as step_module
from normlab.training.loop import train


@pytest.mark.parametrize("value", [np.nan, np.inf, 1.0])
def test_images_of_floating_point_are_refused_whatever_they_hold(tmp_path, value):
    """Pixels are bytes everywhere else, so this is the one way in for NaN."""
    content = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.float32)).save(content, "TIFF")
    for place in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "x.tiff").write_bytes(content.getvalue())
    fields = {"data.path": str(tmp_path), "data.source": "folder", "data.name": "pets"}
    config = load_config("configs/imagenet.py", fields).data
    images = load(config).train
    with pytest.raises(UserError, match=r"x\.tiff' has mode 'F', whose range is unknown"):
        images.decode(0, 3)


def poisoned(monkeypatch, steps):
    """Makes the images of some steps, counted from 0, NaN as they come out of the pipeline."""
    make = step_module.training_batch

    def batch(data, config, info, seed, step, indices):
        images, *rest = make(data, config, info, seed, step, indices)
        bad = jnp.isin(step, jnp.array(steps))
        return jnp.where(bad, jnp.nan, images), *rest

    monkeypatch.setattr(step_module, "training_batch", batch)


def test_a_step_on_nan_is_counted_and_changes_nothing(tmp_path, monkeypatch):
    poisoned(monkeypatch, [6, 8])
    result = train(small(), tmp_path / "run")
    assert result["status"] == "done"
    # Lines come at steps 5, 10 and 12; the seventh step and the ninth are in the second.
    found = [line["nonfinite"] for line in lines(tmp_path / "run") if line["split"] == "train"]
    assert found == [0, 2, 0]
    assert all(
        line["loss"] is not None and np.isfinite(line["loss"]) for line in lines(tmp_path / "run")
    )
    assert "2 steps up to 10 were not finite" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("norm", ["batch_norm", "none"])
def test_nan_that_goes_on_ends_the_run_as_diverged_with_the_last_good_weights(
    tmp_path, monkeypatch, norm
):
    poisoned(monkeypatch, range(3, 12))
    result = train(small(norm, train__max_nonfinite=4), tmp_path / "run")
    assert result["status"] == "diverged"
    # The fourth step was the first, and four in a row are enough.
    assert (result["diverged_step"], result["steps"]) == (4, 7)
    assert np.isfinite(result["test_loss"])


def test_the_report_says_how_many_steps_were_passed_over(tmp_path, monkeypatch):
    poisoned(monkeypatch, [6, 8])
    train(small(), tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 0
    text = (tmp_path / "run" / "report.md").read_text()
    assert "2 steps passed over because something was not finite" in text
