"""What a run logs of its layers: gaps of batch and running statistics, percentiles, signals."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_run import lines, small

from normlab.config import from_json, load_config, to_json
from normlab.data import train_indices, training_batch
from normlab.errors import UserError
from normlab.norms.functional import Moments
from normlab.training import parallel
from normlab.training.examples import load_data
from normlab.training.loop import train
from normlab.training.probe import SAMPLE, gaps, layer_metrics
from normlab.training.restore import restore
from normlab.training.setup import build_parts, id_of
from normlab.training.state import create_state


def moments(mean, var):
    return Moments(count=jnp.full(2, 10.0), mean=jnp.array(mean), var=jnp.array(var))


def test_gaps_by_hand():
    running = {"mean": jnp.array([0.0, 1.0]), "var": jnp.array([3.0, 0.0])}
    found = gaps(moments([4.0, 1.0], [7.0, 0.0]), running, epsilon=1.0)
    # Channel 1: 4/√(3 + 1) and ln(8/4); channel 2: 0 and ln 1.
    assert found["mean_gap"] == pytest.approx((4 / 2 + 0) / 2)
    assert found["variance_gap"] == pytest.approx(np.log(2) / 2, rel=1e-5)
    # Of renormalization σ runs, ε in it.
    by_sigma = gaps(
        moments([4.0, 1.0], [7.0, 0.0]),
        {"mean": running["mean"], "sigma": jnp.array([2.0, 1.0])},
        epsilon=1.0,
    )
    assert by_sigma == found


def test_gaps_of_other_states():
    batch = moments([4.0, 1.0], [3.0, 0.0])
    # Mean-only: the batch's own deviation divides, √(3 + 1) and 1.
    assert gaps(batch, {"mean": jnp.array([0.0, 3.0])}, 1.0) == {"mean_gap": 2.0}
    assert list(gaps(batch, {"var": jnp.array([3.0, 1.0])}, 1.0)) == ["variance_gap"]
    assert gaps(batch, {}, 1.0) == {}
    assert gaps(batch, {"mean": jnp.zeros(3), "var": jnp.ones(3)}, 1.0) == {}


def metrics_of(config, variables=None, step=2):
    parts, compiler, mesh = build_parts(config), parallel.Compiler(), parallel.make_mesh()
    variables = variables or create_state(parts, compiler).variables()
    data = load_data(config, mesh)
    found = layer_metrics(
        config, parts.model, parts.info, compiler, mesh, variables, step, data.train
    )
    return parts, variables, data, found


def test_they_are_those_of_the_steps_batch_as_it_was_augmented():
    """By numpy: the first layer of an MLP on the images of step 2, cropped."""
    fields = {"model.widths": (8, 6), "probe.layers": ("norm1",), "data.crop_padding": 1}
    config = load_config("configs/digits.py:model=mlp", fields)
    parts, variables, data, found = metrics_of(config)
    [rows] = train_indices(0, 2, 1, config.train.batch_size, len(data.train))
    images, _ = training_batch(
        data.train.examples, config.data, parts.info, parallel.seed_array(0), jnp.array(2), rows
    )
    x = np.asarray(images, np.float64).reshape(len(rows), -1)
    y = x @ np.asarray(variables["params"]["dense1"]["kernel"], np.float64)
    mean, var = y.mean(0), y.var(0)
    names = ("mean_gap", "variance_gap", "p15", "p50", "p85")
    assert set(found) == {f"norm1/{name}" for name in names}
    # At the start 0 and 1 run.
    scale = np.sqrt(1 + 1e-5)
    assert found["norm1/mean_gap"] == pytest.approx(np.mean(np.abs(mean)) / scale, rel=1e-4)
    ratio = (var + 1e-5) / (1 + 1e-5)
    assert found["norm1/variance_gap"] == pytest.approx(np.mean(np.log(ratio)), rel=1e-3)
    normalized = (y - mean) / np.sqrt(var + 1e-5)
    assert normalized.size < SAMPLE
    for p in (15, 50, 85):
        assert found[f"norm1/p{p}"] == pytest.approx(np.percentile(normalized, p), abs=1e-4)


def test_percentiles_of_many_values_are_those_of_a_sample_of_all_channels():
    """Channels of mean 0, 1, 2, ...: a sample of every k-th value would miss some of them."""
    fields = {"probe.layers": ("norm1",), "train.batch_size": 256, "model.widths": (16,)}
    fields |= {"model.strides": (1,), "norm.use_scale": False}
    config = load_config("configs/digits.py:model=cnn", fields)
    parts = build_parts(config)
    variables = create_state(parts, parallel.Compiler()).variables()
    variables["params"]["norm1"]["bias"] = 100.0 * jnp.arange(16)
    _, _, _, found = metrics_of(config, variables)
    # 256·64·16 values, 16 steps of equal weight: 15% is in the third, 85% in the fourteenth.
    assert found["norm1/p15"] == pytest.approx(200, abs=5)
    assert found["norm1/p85"] == pytest.approx(1300, abs=5)


@pytest.mark.slow
def test_with_running_statistics_of_the_batch_itself_the_gaps_are_zero():
    config = small(probe__layers=("*",), norm__momentum=0.0)
    parts, variables, data, _ = metrics_of(config, step=0)
    rows = train_indices(0, 0, 1, config.train.batch_size, len(data.train))[0]
    images, _ = training_batch(
        data.train.examples, config.data, parts.info, parallel.seed_array(0), jnp.array(0), rows
    )
    _, updated = parts.model.apply(variables, images, train=True, mutable=["batch_stats"])
    variables = {**variables, "batch_stats": updated["batch_stats"]}
    _, _, _, found = metrics_of(config, variables, step=0)
    for layer in ("norm1", "norm2"):
        assert found[f"{layer}/mean_gap"] == pytest.approx(0, abs=1e-5)
        assert found[f"{layer}/variance_gap"] == pytest.approx(0, abs=1e-5)
    # Another batch is another matter.
    _, _, _, other = metrics_of(config, variables, step=1)
    assert other["norm1/mean_gap"] > 1e-3


def test_a_run_logs_them_at_each_log_event_and_trains_the_same(tmp_path):
    watched, plain = tmp_path / "watched", tmp_path / "plain"
    result = train(small("batch_renorm", probe__layers=("norm2",)), watched)
    assert train(small("batch_renorm"), plain)["test_loss"] == result["test_loss"]
    by_step = {line["step"]: line for line in lines(watched) if line["split"] == "layers"}
    measures = {line["step"]: line for line in lines(plain) if line["split"] == "layers"}
    start = by_step.pop(0)  # before the first step; measured by the step itself is nothing yet
    assert list(by_step) == list(measures) == [5, 10, 12]
    new = {f"norm2/{name}" for name in ("mean_gap", "variance_gap", "p15", "p50", "p85")}
    for step, line in by_step.items():
        assert line.keys() - measures[step].keys() == new
        assert all(line[name] == value for name, value in measures[step].items())
    assert start.keys() - {"step", "split"} == new
    assert start["norm2/variance_gap"] != by_step[5]["norm2/variance_gap"]
    # The last line is of the final weights and the batch of the last step.
    parts, step, state = restore(watched, None)
    _, _, _, found = metrics_of(parts.config, state.variables(), step - 1)
    assert {name: by_step[12][name] for name in found} == pytest.approx(found, rel=1e-4)


def test_a_run_cut_off_before_the_line_of_its_layers_writes_the_same_one(tmp_path):
    class Cut(Exception):
        pass

    def cut(step, _total, line):
        if line and (step, line["split"]) == (10, "train"):
            raise Cut

    config = small(probe__layers=("*",))
    train(config, tmp_path / "whole")
    with pytest.raises(Cut):
        train(config, tmp_path / "cut", progress=cut)
    train(config, tmp_path / "cut")
    whole, again = (tmp_path / name / "metrics.jsonl" for name in ("whole", "cut"))
    assert whole.read_bytes() == again.read_bytes()


def test_what_is_watched_is_no_part_of_a_runs_identity():
    config = small()
    assert id_of(small(probe__layers=("*",))) == id_of(config)
    # A run from before the fields were there is reloaded with nothing watched.
    saved = to_json(config)
    del saved["probe"]["layers"], saved["probe"]["signals"]
    assert from_json(saved).probe.layers == ()
    assert id_of(small(probe__unit=1)) != id_of(config)


def test_signals_of_residual_blocks_are_logged_on_request():
    fields = {"model.stage_sizes": (1, 1, 1), "model.width": 4, "probe.signals": True}
    config = load_config("configs/digits.py:model=resnet20", fields)
    _, _, _, found = metrics_of(config)
    names = ("mean_squared", "variance", "branch_variance")
    blocks = [f"stage{i}_block1" for i in (1, 2, 3)]
    assert set(found) == {f"{block}/{name}" for block in blocks for name in names}
    # A branch that ends in batch normalization has variance 1.
    assert all(found[f"{block}/branch_variance"] == pytest.approx(1, rel=1e-3) for block in blocks)


@pytest.mark.parametrize(
    "norm", ["none", "full_norm", "iterative_norm", "evonorm_b0", "power_norm"]
)
def test_any_normalizer_can_be_watched(norm):
    _, _, _, found = metrics_of(small(norm, probe__layers=("*",)))
    assert {"norm1/p15", "norm2/p85"} <= found.keys()
    assert all(np.isfinite(value) for value in found.values())
    has_mean = norm in ("full_norm", "iterative_norm")
    assert ("norm1/mean_gap" in found) == has_mean
    assert ("norm1/variance_gap" in found) == (norm in ("full_norm", "evonorm_b0"))


def test_layers_in_a_loop_are_watched_over_all_their_steps():
    fields = {"model.widths": (8,), "probe.layers": ("*",), "train.batch_size": 16}
    _, _, _, found = metrics_of(load_config("configs/digits.py:model=rnn", fields))
    assert "layer1/cell/norm_hidden/variance_gap" in found
    assert all(np.isfinite(value) for value in found.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"probe__layers": ("nrm1",)}, "unknown normalizer in 'probe.layers' 'nrm1'; did you mean"),
        ({"probe__signals": True}, "'probe.signals' = True, but model 'cnn' has no residual"),
        ({"probe__layers": ("*",), "probe__percentiles": (101.0,)}, "has 101.0"),
    ],
)
def test_what_cannot_be_watched_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        build_parts(small(**fields))
