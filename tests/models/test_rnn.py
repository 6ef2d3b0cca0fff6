"""The model rnn: counts, what a step is, and a state with a time axis in every part of a run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from normlab import run
from normlab.analysis.calibration import calibrate
from normlab.analysis.folding import fold
from normlab.config import load_config
from normlab.errors import UserError
from normlab.models import build, count_params
from normlab.models.cost import macs
from normlab.models.layers import norm_layers
from normlab.models.rnn import sequence
from normlab.models.weight_space import START
from normlab.optim import roles
from normlab.training import parallel
from normlab.training.evaluate import Evaluator
from normlab.training.examples import load_data
from normlab.training.loop import train
from normlab.training.probe import unit_percentiles
from normlab.training.restore import open_run
from normlab.training.setup import build_parts
from normlab.training.state import create_state
from normlab.training.step import make_loss

PLACES = ("norm_hidden", "norm_input", "norm_cell")


def config_of(norm="batch_norm", data="digits", **fields):
    names = {name.replace("__", "."): value for name, value in fields.items()}
    return load_config(f"configs/{data}.py:model=rnn,norm={norm}", names)


def variables_of(config, shape=(8, 8, 1)):
    net = build(config)
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    return jax.eval_shape(lambda x: net.init(jax.random.key(0), x, train=False), images)


def test_parameters_by_hand():
    # Rows of digits: W_x 8·400, W_h 100·400, b 400, gains 400 + 400, cell 100 + 100, head 1,010.
    by_hand = 3_200 + 40_000 + 400 + 800 + 200 + 1_010
    assert count_params(variables_of(config_of())["params"]) == by_hand == 45_610
    # One pixel a step: W_x has 1·400; without normalizers 1,000 fewer.
    pixels = config_of("none", model__steps="pixels")
    assert count_params(variables_of(pixels)["params"]) == by_hand - 2_800 - 1_000
    # Simple cell, one gate, two layers of 10 and 6: 80 + 100 + 10 + 20, 60 + 36 + 6 + 12, 70.
    simple = config_of(model__cell="simple", model__widths=(10, 6))
    assert count_params(variables_of(simple)["params"]) == 210 + 114 + 70


def test_every_entry_of_the_state_has_a_row_for_each_step():
    stats = variables_of(config_of("batch_renorm"))["batch_stats"]["layer1"]["cell"]
    assert set(stats) == set(PLACES)
    assert stats["norm_input"]["mean"].shape == (8, 400)
    assert stats["norm_cell"]["step"].shape == (8,)
    pixels = variables_of(config_of(model__steps="pixels"))["batch_stats"]["layer1"]["cell"]
    assert pixels["norm_cell"]["var"].shape == (64, 100)


def test_a_loop_costs_its_body_times_its_length():
    # 8 steps of (8 + 100)·400, and the head.
    assert macs(build(config_of("none")), (8, 8, 1)) == 8 * 108 * 400 + 1_000
    assert macs(build(config_of("layer_norm")), (8, 8, 1)) == 8 * 108 * 400 + 1_000


def test_sequences_are_rows_or_pixels_in_a_fixed_order():
    x = jnp.arange(2 * 3 * 4 * 2).reshape(2, 3, 4, 2)
    rows = sequence(x, "rows")
    np.testing.assert_array_equal(rows, x.reshape(2, 3, 8))
    np.testing.assert_array_equal(sequence(x, "pixels"), x.reshape(2, 12, 2))
    mixed = sequence(x, "pixels", permutation_seed=3)
    np.testing.assert_array_equal(mixed, sequence(x, "pixels", permutation_seed=3))
    assert not np.array_equal(mixed, x.reshape(2, 12, 2))
    assert not np.array_equal(mixed, sequence(x, "pixels", permutation_seed=4))
    for image, pixels in zip(x, mixed, strict=True):
        assert sorted(pixels.tolist()) == sorted(image.reshape(12, 2).tolist())
    np.testing.assert_array_equal(sequence(x, "rows", permutation_seed=3), mixed.reshape(2, 3, 8))


def test_normalizers_are_listed_once_and_overrides_reach_them():
    config = config_of(norm_overrides="*/norm_hidden=none,*/norm_cell=layer_norm")
    layers = norm_layers(build(config), (8, 8, 1))
    assert [(x.path, x.kind, x.shape) for x in layers] == [
        ("layer1/cell/norm_hidden", "none", (400,)),
        ("layer1/cell/norm_input", "batch_norm", (400,)),
        ("layer1/cell/norm_cell", "layer_norm", (100,)),
    ]
    assert build_parts(config)
    with pytest.raises(UserError, match=r"did you mean 'layer1/cell/norm_input'"):
        build_parts(config_of(norm_overrides="layer1/cel/norm_input=none"))


def test_the_rule_of_laurent_is_a_choice():
    config = config_of(model__normalized="input")
    assert [x.path for x in norm_layers(build(config), (8, 8, 1))] == ["layer1/cell/norm_input"]


def test_roles_are_those_of_linear_layers_and_normalizers():
    found = roles(variables_of(config_of())["params"])["layer1"]
    assert found["input"] == {"kernel": "kernel"}
    assert found["cell"]["bias"] == "bias"
    assert found["cell"]["hidden"] == {"kernel": "kernel"}
    assert found["cell"]["norm_cell"] == {"scale": "norm_scale", "bias": "norm_bias"}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("cell", "lst", "unknown 'model.cell' 'lst'; did you mean 'lstm'?"),
        ("statistics", "step", "unknown 'model.statistics' 'step'"),
        ("steps", "row", "unknown 'model.steps' 'row'; did you mean 'rows'?"),
        (
            "normalized",
            "inputs",
            "unknown place in 'model.normalized' 'inputs'; did you",
        ),
        ("widths", (0,), "'model.widths' = (0,) must each be from 1"),
    ],
)
def test_what_there_is_not_is_refused_in_a_line(field, value, message):
    with pytest.raises(UserError) as refused:
        build_parts(config_of(**{f"model__{field}": value}))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_folding_is_refused():
    variables = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), variables_of(config_of()))
    with pytest.raises(UserError, match=r"cannot fold the normalizer 'layer1/cell/norm_.*loop"):
        fold(build(config_of()), variables, (8, 8, 1))


def small(norm="batch_norm", **fields):
    return config_of(norm, model__widths=(5,), train__batch_size=64, **fields)


def images_of(parts, examples):
    """[N, 8, 8] as the model has them."""
    raw = np.asarray(examples.examples[0], np.float64)[..., 0]
    return (raw / 255 - parts.info.mean[0]) / parts.info.std[0]


def test_recomputed_statistics_are_those_of_the_whole_training_set_at_each_step():
    """W_x x is no function of other statistics, so its moments are numpy's."""
    parts = build_parts(small())
    compiler, mesh = parallel.Compiler(), parallel.make_mesh()
    variables = create_state(parts, compiler).variables()
    data = load_data(parts.config, mesh).train
    made = Evaluator(parts.model, parts.info, mesh, compiler)
    stats = made.recompute(variables, data, 64)["batch_stats"]["layer1"]["cell"]
    kernel = np.asarray(variables["params"]["layer1"]["input"]["kernel"], np.float64)
    gates = images_of(parts, data) @ kernel  # 1,437 is no multiple of 64
    np.testing.assert_allclose(stats["norm_input"]["mean"], gates.mean(0), atol=1e-4)
    np.testing.assert_allclose(stats["norm_input"]["var"], gates.var(0), rtol=1e-3, atol=1e-5)
    assert stats["norm_cell"]["var"].shape == (8, 5)
    assert not np.allclose(stats["norm_cell"]["var"][0], stats["norm_cell"]["var"][7], rtol=0.1)


@pytest.mark.parametrize("statistics", ["per_step", "shared"])
def test_the_probe_sees_a_unit_at_every_step(statistics):
    fields = {"probe__layer": "layer1/cell/norm_input", "probe__unit": 2}
    parts = build_parts(small(model__statistics=statistics, **fields))
    compiler = parallel.Compiler()
    variables = create_state(parts, compiler).variables()
    test = load_data(parts.config, parallel.make_mesh()).evaluated["test"]
    got = unit_percentiles(parts.config, parts.model, parts.info, compiler, variables, test)
    kernel = np.asarray(variables["params"]["layer1"]["input"]["kernel"], np.float64)
    unit = 0.1 * (images_of(parts, test) @ kernel)[..., 2]  # mean 0, variance 1 as they start
    np.testing.assert_allclose(list(got.values()), np.percentile(unit, (15, 50, 85)), atol=1e-5)


def test_a_statistic_that_is_not_finite_at_one_step_is_seen():
    parts = build_parts(small())
    variables = create_state(parts, parallel.Compiler()).variables()
    loss = jax.jit(make_loss(parts.model))
    images = jnp.zeros((4, 8, 8, 1)).at[1, 5].set(1.0)
    labels = jnp.arange(4)
    for size, sound in ((1.0, True), (1e30, False)):  # the square of 1e30 is infinite in float32
        _, _, found, _ = loss(*variables.values(), (size * images, labels))[1]
        assert bool(found) is sound


def test_variants_of_one_seed_share_the_initial_values_they_have_in_common():
    def initial(norm):
        init = jax.jit(functools.partial(build(small(norm)).init, train=False))
        params = init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
        return traverse_util.flatten_dict(params, sep="/")

    reference, others = initial("none"), [initial(norm) for norm in ("batch_norm", "rms_norm")]
    assert len(reference) == 5  # three kernels, and the biases of cell and head
    for other in others:
        for name, value in reference.items():
            np.testing.assert_array_equal(other[name], value)


def test_inside_the_recurrence_no_weight_starts_from_the_data():
    config = load_config(
        "configs/digits.py:model=rnn,norm=none,conv=weight_norm", {"conv.data_dependent": True}
    )
    net, images = build(config), jnp.ones((4, 8, 8, 1))

    def start():
        variables = net.init(jax.random.key(0), images, train=False)
        return net.apply(variables, images, train=True, mutable=[START])[1][START]

    assert set(traverse_util.flatten_dict(jax.eval_shape(start), sep="/")) == {
        "layer1/input/gain",
        "head/gain",
        "head/bias",
    }


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", "none", "power_norm"])
def test_it_learns_digits_and_every_command_takes_the_run(norm, tmp_path):
    settings = {
        "optim__base_lr": 0.2,
        "model__widths": (32,),
        "train__num_epochs": 10.0,
        "log__tensorboard": False,
        "train__ema_decay": 0.9,
    }
    folder = tmp_path / "run"
    train(config_of(norm, train__batch_size=64, **settings), folder)
    result = run.read_json(folder / "result.json")
    assert result["test_accuracy"] > 0.8  # chance is 0.1
    # The checkpoint has every step's statistics, and calibration writes such a one.
    there = open_run(folder)
    if norm == "batch_norm":
        assert there.variables["batch_stats"]["layer1"]["cell"]["norm_cell"]["var"].shape == (8, 32)
        found = calibrate(folder, workdir=tmp_path / "calibrated")
        exact = open_run(tmp_path / "calibrated").variables["batch_stats"]
        assert exact["layer1"]["cell"]["norm_input"]["mean"].shape == (8, 128)
        assert found["test_accuracy_recomputed_statistics"] > 0.8
