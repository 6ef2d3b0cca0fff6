"""States of Keras, flax.linen and Haiku to and from ours, made up: names, averages, errors."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from normlab.errors import UserError
from normlab.interop import haiku, keras, linen

C = 3


def numbers(*shape):
    return np.arange(1.0, 1 + np.prod(shape), dtype="f4").reshape(shape)


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_no_framework_is_imported():
    """flax and jax are normlab's own; the others may be absent, and take seconds."""
    script = """
import sys
import normlab.interop
print(*({name.partition(".")[0] for name in sys.modules} & {"torch", "keras", "haiku"}))
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == ""


OURS = {
    "batch_norm": {
        "params": {"scale": numbers(C), "bias": -numbers(C)},
        "batch_stats": {"mean": numbers(C) / 4, "var": numbers(C) / 8},
    },
    "layer_norm": {"params": {"scale": numbers(4, C), "bias": -numbers(4, C)}},
    "group_norm": {"params": {"scale": numbers(C), "bias": -numbers(C)}},
    "instance_norm": {"params": {"scale": numbers(C)}},
    "rms_norm": {"params": {"scale": numbers(C)}},
}


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("convert", [keras, linen], ids=["keras", "linen"])
def test_our_variables_come_back(convert, kind):
    state = convert.norm_state(kind, OURS[kind])
    same(convert.norm_variables(kind, state), OURS[kind])


@pytest.mark.parametrize("kind", OURS)
def test_our_variables_come_back_from_haiku(kind):
    ours, options = OURS[kind], {}
    if kind == "batch_norm":
        step = {"step": np.array(2, "i4")}
        ours = {**ours, "batch_stats": ours["batch_stats"] | step}
        options = {"rank": 4, "decay_rate": 0.5}
    params, state = haiku.norm_state(kind, ours, name="net/~/norm", **options)
    same(haiku.norm_variables(kind, params, state, name="net/~/norm"), ours)
    # Beside other modules, too.
    same(haiku.norm_variables(kind, {**params, "other": {}}, state, name="net/~/norm"), ours)


# Keras -------------------------------------------------------------------------------------------


def renorm():
    return {
        "gamma": numbers(C),
        "moving_mean": numbers(C),
        "moving_variance": numbers(C) ** 2 - np.float32(0.5),
        "moving_stddev": numbers(C),
        "renorm_mean": numbers(C),
        "renorm_stddev": numbers(C),
    }


def test_renorm_keeps_one_average_where_keras_keeps_two_and_the_variance():
    variables = keras.norm_variables("batch_renorm", renorm())
    same(variables["batch_stats"]["sigma"], numbers(C))
    assert variables["batch_stats"]["step"] == 0
    # σ² − ε = 1 − 0.5, 4 − 0.5, 9 − 0.5.
    same(keras.norm_state("batch_renorm", variables, epsilon=0.5), renorm())


def test_without_limits_keras_clips_nothing():
    fields = keras.norm_fields("batch_renorm", {})
    assert (fields["r_max"], fields["d_max"], fields["momentum"]) == (np.inf, np.inf, 0.99)
    module_fields = {**fields, "momentum": 0.9}
    arguments = keras.norm_arguments("batch_renorm", module_fields, (C,))
    assert arguments["renorm_momentum"] == arguments["momentum"] == 0.9


def test_minus_one_groups_are_one_a_channel():
    fields = keras.norm_fields("group_norm", {"groups": -1})
    assert fields["group_size"] == 1
    assert keras.norm_arguments("group_norm", fields, (4, C))["groups"] == C


# Haiku -------------------------------------------------------------------------------------------


def test_haikus_hidden_average_is_the_one_before_the_division():
    # Average 5 after 2 updates with decay 1/2: hidden = 5·(1 − 1/4) = 3.75.
    ours = {"batch_stats": {"mean": np.array([5.0], "f4"), "var": np.array([5.0], "f4")}}
    ours["batch_stats"]["step"] = np.array(2, "i4")
    params, state = haiku.norm_state("batch_norm", ours, name="bn", rank=3, decay_rate=0.5)
    assert params == {}
    assert state["bn/~/mean_ema"]["hidden"].shape == (1, 1, 1)
    assert state["bn/~/mean_ema"]["hidden"].item() == 3.75
    assert state["bn/~/var_ema"]["counter"] == 2


def test_haikus_gain_per_element_loses_the_axis_of_examples():
    params = {"ln": {"scale": numbers(1, 4, C), "offset": numbers(1, 4, C)}}
    variables = haiku.norm_variables("layer_norm", params, name="ln")
    assert variables["params"]["scale"].shape == (4, C)
    same(haiku.norm_state("layer_norm", variables, name="ln")[0], params)


@pytest.mark.parametrize(
    ("axis", "axes"),
    [(-1, "channel"), ((-1,), "channel"), (slice(1, None), "all"), ((1, 2), "all"),
     ((-2, -1), "all"), ([1, 2, 3], "all")],
)  # fmt: skip
def test_axes_of_either_sign_are_read(axis, axes):
    arguments = {"axis": axis, "create_scale": True, "create_offset": True}
    assert haiku.norm_fields("layer_norm", arguments)["axes"] == axes


# Weight norm -------------------------------------------------------------------------------------


def test_weight_norm_of_linen_comes_back():
    tree = {
        "layer_instance": {"kernel": numbers(2, 4), "bias": numbers(4)},
        "layer_instance/kernel/scale": numbers(4),
    }
    params = linen.layer_params(tree)
    assert sorted(params) == ["bias", "gain", "kernel"]
    same(linen.layer_state(params), tree)


# Errors ------------------------------------------------------------------------------------------

BOTH = {"create_scale": True, "create_offset": True}
ERRORS = {
    "two averages": (
        lambda: keras.norm_variables("batch_renorm", {**renorm(), "renorm_mean": -numbers(C)}),
        "'moving_mean' and 'renorm_mean' differ; normlab keeps one average",
    ),
    "renorm lacks": (
        lambda: keras.norm_variables(
            "batch_renorm", {k: v for k, v in renorm().items() if k != "moving_stddev"}
        ),
        "lacks 'moving_stddev'",
    ),
    "two momenta": (
        lambda: keras.norm_fields("batch_renorm", {"momentum": 0.9}),
        "'renorm_momentum' = 0.99 and 'momentum' = 0.9",
    ),
    "one-sided clipping": (
        lambda: keras.norm_fields("batch_renorm", {"renorm_clipping": {"rmax": 4.0}}),
        "rmin = 0.0 is not 1/rmax = 0.25",
    ),
    "ramps": (
        lambda: keras.norm_arguments("batch_renorm", {}, (C,)),
        "'ramp_start_steps' = 5000 has no counterpart in Keras; 0 has",
    ),
    "epsilon": (
        lambda: keras.norm_state("batch_renorm", {}),
        "needs the layer's epsilon",
    ),
    "unbiased": (
        lambda: keras.norm_arguments("batch_norm", {"running_variance": "unbiased"}, (C,)),
        "'running_variance' = 'unbiased' has no counterpart in Keras; 'biased' has",
    ),
    "not renorm": (
        lambda: keras.norm_fields("batch_norm", {"renorm": True}),
        "'renorm' = True has no counterpart",
    ),
    "keras shape": (
        lambda: keras.norm_variables("group_norm", {"gamma": numbers(3), "beta": numbers(4)}),
        r"'beta' has shape \(4,\), unlike 'gamma': \(3,\)",
    ),
    "axes": (
        lambda: keras.norm_fields("layer_norm", {"axis": [2]}),
        r"over axes \[2\] has no counterpart",
    ),
    "keras per channel": (
        lambda: keras.norm_arguments("layer_norm", {}, (4, C)),
        "gain is per element; groups=1 has",
    ),
    "plain averages": (
        lambda: haiku.norm_arguments("batch_norm", {}, (C,)),
        "'zero_debias' = False has no counterpart in Haiku; True has",
    ),
    "decay": (lambda: haiku.norm_fields("batch_norm", BOTH), "'decay_rate' is missing"),
    "rank": (
        lambda: haiku.norm_state(
            "batch_norm",
            {"batch_stats": {**OURS["batch_norm"]["batch_stats"], "step": np.array(1)}},
            name="bn",
        ),
        "needs the input's rank and the module's decay_rate",
    ),
    "no counter": (
        lambda: haiku.norm_state("batch_norm", OURS["batch_norm"], name="bn"),
        "batch_norm for Haiku lacks 'step'",
    ),
    "dtype": (
        lambda: haiku.norm_arguments("instance_norm", {"dtype": "bfloat16"}, (C,)),
        "'dtype' = 'bfloat16' has no counterpart in Haiku; None has",
    ),
    "average": (
        lambda: haiku.norm_variables("batch_norm", {}, {"bm/~/mean_ema": {}}, name="bn"),
        "lacks 'bn/~/mean_ema'; did you mean 'bm/~/mean_ema'?",
    ),
    "module": (
        lambda: haiku.norm_variables("group_norm", {"norm_1": {}}, name="norm1"),
        "'norm1'; did you mean 'norm_1'?",
    ),
    "features": (
        lambda: linen.norm_fields("layer_norm", {"feature_axes": (1, 2)}),
        "'feature_axes' must be -1",
    ),
    "linen entry": (
        lambda: linen.norm_variables("batch_norm", {"params": {"gamma": numbers(C)}}),
        "'gamma'; one of scale, bias, mean, var",
    ),
    "wrapped": (
        lambda: linen.layer_params({"Dense_0/kernel/scale": numbers(4)}, "Dense_0"),
        "lacks 'Dense_0'",
    ),
    "ghosts": (
        lambda: linen.norm_arguments("batch_norm", {"ghost_size": 2}, (C,)),
        "'ghost_size' = 2 has no counterpart in flax.linen; None has",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_does_not_fit_is_one_line_that_names_it(name):
    call, expected = ERRORS[name]
    with pytest.raises(UserError, match=expected) as error:
        call()
    assert "\n" not in str(error.value)
