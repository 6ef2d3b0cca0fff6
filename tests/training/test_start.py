"""Weight norm's data-dependent start, before step 0 of a run."""

import numpy as np

from normlab import run
from normlab.config import load_config
from normlab.models.weight_space import START
from normlab.training import parallel
from normlab.training.examples import load_data
from normlab.training.loop import train
from normlab.training.setup import build_parts
from normlab.training.start import merged, start_from_data
from normlab.training.state import create_state

SETTINGS = {
    "model.widths": (4, 6),
    "model.strides": (2, 2),
    "train.num_steps": 2,
    "train.batch_size": 64,
    "train.ema_decay": 0.9,
    "log.tensorboard": False,
}


def config_of(**overrides):
    source = "configs/digits.py:model=cnn,norm=none,conv=weight_norm"
    return load_config(source, SETTINGS | {k.replace("__", "."): v for k, v in overrides.items()})


def test_gains_and_biases_are_those_of_the_first_batch_and_kernels_stay():
    parts, compiler = build_parts(config_of(conv__data_dependent=True)), parallel.Compiler()
    data = load_data(parts.config, parallel.make_mesh())
    plain = create_state(parts, compiler)
    started = start_from_data(parts, plain, data, compiler)
    for layer in ("conv1", "conv2", "head"):
        before, after = plain.params[layer], started.params[layer]
        np.testing.assert_array_equal(after["kernel"], before["kernel"])
        assert not np.allclose(after["gain"], before["gain"])
        assert np.any(after["bias"])
        np.testing.assert_array_equal(started.ema["params"][layer]["gain"], after["gain"])
    # Started once more from there, nothing moves: the batch has variance 1 already.
    again = start_from_data(parts, started, data, compiler)
    np.testing.assert_allclose(
        again.params["conv2"]["gain"], started.params["conv2"]["gain"], rtol=1e-4
    )
    assert START not in started.variables()


def test_a_run_starts_there_if_asked(tmp_path):
    gains = []
    for asked in (False, True):
        folder = tmp_path / str(asked)
        result = train(config_of(conv__data_dependent=asked), folder)
        assert np.isfinite(result["test_loss"])
        hashes = run.read_json(folder / "manifest.json")["init_hashes"]
        gains.append((hashes["conv1/gain"], hashes["conv1/kernel"]))
    assert gains[0][0] != gains[1][0]
    assert gains[0][1] == gains[1][1]


def test_merging_replaces_what_was_found_and_nothing_else():
    params = {"a": {"kernel": 1, "gain": 2}, "b": {"kernel": 3}}
    assert merged(params, {"a": {"gain": 5}}) == {"a": {"kernel": 1, "gain": 5}, "b": {"kernel": 3}}
