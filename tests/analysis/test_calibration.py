"""`normlab calibrate`: exact statistics, for any weights, written beside the run or not at all."""

import jax
import numpy as np
import pytest

from normlab import run
from normlab.analysis.calibration import calibrate
from normlab.analysis.folding import evaluate_folded
from normlab.cli import main
from normlab.config import load_config
from normlab.errors import UserError
from normlab.training.loop import train
from normlab.training.restore import evaluate_run, open_run

SETTINGS = {
    "model.widths": (4, 6),
    "model.strides": (2, 2),
    "train.num_steps": 12,
    "train.batch_size": 64,
    "train.ema_decay": 0.9,
    "log.tensorboard": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(load_config("configs/digits.py:model=cnn", SETTINGS), folder)
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_measures_in_three_ways_and_leaves_the_run_as_it_is(folder):
    before = contents(folder)
    found = calibrate(folder)
    assert contents(folder) == before
    assert (found["step"], found["weights"], found["examples"]) == (12, "ema", 1437)
    result = run.read_json(folder / "result.json")
    assert found["test_accuracy_running_statistics"] == result["test_accuracy"]
    for way in ("batch", "recomputed"):
        assert (
            found[f"test_accuracy_{way}_statistics"] == (result[f"test_accuracy_{way}_statistics"])
        )


@pytest.mark.slow
def test_a_written_folder_is_evaluated_with_the_new_statistics(folder, tmp_path):
    for use_ema in (True, False):
        new = tmp_path / f"ema_{use_ema}"
        found = calibrate(folder, use_ema=use_ema, workdir=new)
        again = evaluate_run(new)
        assert again["test_accuracy"] == found["test_accuracy_recomputed_statistics"]
        assert again["test_loss"] == pytest.approx(found["test_loss_recomputed_statistics"])
        # The weights are those of the run, and the statistics are not.
        there, here = (open_run(at, use_ema=use_ema).variables for at in (folder, new))
        jax.tree.map(np.testing.assert_array_equal, there["params"], here["params"])
        a, b = (v["batch_stats"]["norm1"]["var"] for v in (there, here))
        assert not np.allclose(a, b, rtol=1e-3)
    assert run.read_json(new / "manifest.json")["calibrated"]["weights"] == "raw"


def test_nothing_is_overwritten_and_nothing_trains_on_from_a_calibrated_folder(folder, tmp_path):
    with pytest.raises(UserError, match="exists; choose a new folder"):
        calibrate(folder, workdir=folder)
    new = tmp_path / "new"
    calibrate(folder, num_batches=1, workdir=new)
    with pytest.raises(UserError, match="is not a run folder"):
        train(load_config("configs/digits.py:model=cnn", SETTINGS), new)


def test_a_few_batches_come_near_the_whole_pass(folder):
    there = open_run(folder)
    exact, few, other = (
        there.evaluator.recompute(there.variables, there.data.train, 64, num_batches=number)
        for number in (None, 8, 10_000)
    )
    a, b, c = (v["batch_stats"]["norm1"]["var"] for v in (exact, few, other))
    np.testing.assert_allclose(c, a, rtol=1e-5)  # every example, in another order
    np.testing.assert_allclose(b, a, rtol=0.2)
    assert not np.allclose(b, a, rtol=1e-4)
    assert calibrate(folder, num_batches=2)["examples"] == 128


def test_what_cannot_be_calibrated_is_refused(folder, tmp_path, capsys):
    stateless = tmp_path / "ln"
    config = load_config("configs/digits.py:model=cnn,norm=layer_norm", SETTINGS)
    config.train.num_steps = 1
    train(config, stateless)
    with pytest.raises(UserError, match="norm 'layer_norm' has no statistics to calibrate"):
        calibrate(stateless)
    assert main(["calibrate", str(folder), "--batches=0"]) == 2
    assert "--batches=0 must be 1 or more" in capsys.readouterr().err


def test_a_folded_run_has_the_same_metrics_and_a_speed(folder, capsys):
    found = evaluate_folded(folder)
    assert found["test_accuracy_folded"] == found["test_accuracy_plain"]
    assert found["test_loss_folded"] == pytest.approx(found["test_loss_plain"], rel=1e-5)
    assert found["speed_up"] == found["seconds_plain"] / found["seconds_folded"]
    assert main(["eval", "--fold", str(folder)]) == 0
    assert "speed_up" in capsys.readouterr().out
