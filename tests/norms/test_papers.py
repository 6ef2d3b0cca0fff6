"""Every normalizer against float64 numpy from its paper's equations: outputs, gradients by input
and parameters, three updates of the state, and inference after each.
"""

from functools import partial

import backward_equations as backward
import batch_equations as of_batch
import example_equations as of_example
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from paper_reference import assert_follows, numpy64, start, stepper, widened

from normlab.norms import NORMS

EQUATIONS = {
    "none": of_example.none,
    "batch_norm": of_batch.batch_norm,
    "batch_renorm": of_batch.batch_renorm,
    "l1_batch_norm": of_batch.l1_batch_norm,
    "mean_only_batch_norm": of_batch.mean_only_batch_norm,
    "batch_group_norm": of_batch.batch_group_norm,
    "batch_layer_norm": of_batch.batch_layer_norm,
    "cross_iteration_batch_norm": of_batch.cross_iteration_batch_norm,
    "full_norm": backward.full_norm,
    "moving_average_batch_norm": backward.moving_average_batch_norm,
    "online_norm": backward.online_norm,
    "power_norm": backward.power_norm,
    "layer_norm": of_example.layer_norm,
    "rms_norm": of_example.rms_norm,
    "group_norm": of_example.group_norm,
    "instance_norm": of_example.instance_norm,
    "switchable_norm": of_example.switchable_norm,
    "filter_response_norm": of_example.filter_response_norm,
    "evonorm_b0": of_example.evonorm_b0,
    "evonorm_s0": of_example.evonorm_s0,
    "proxy_norm": of_example.proxy_norm,
    "decorrelated_batch_norm": of_batch.decorrelated_batch_norm,
    "iterative_norm": of_batch.iterative_norm,
    "dyt": of_example.dyt,
    "derf": of_example.derf,
}
VARIANTS = {
    "batch_norm unbiased": partial(of_batch.batch_norm, running_variance="unbiased"),
    "batch_layer_norm biased": partial(of_batch.batch_layer_norm, running_variance="biased"),
    "batch_layer_norm plus": partial(of_batch.batch_layer_norm, delta_sign=1),
    "layer_norm channel": partial(of_example.layer_norm, axes="channel"),
    "layer_norm elementwise": partial(of_example.layer_norm, elementwise=True),
    "rms_norm channel": partial(of_example.rms_norm, axes="channel"),
    "filter_response_norm always": partial(of_example.filter_response_norm, learn_epsilon="always"),
    "proxy_norm groups": partial(of_example.proxy_norm, groups=2),
    "cross_iteration_batch_norm long": partial(of_batch.cross_iteration_batch_norm, window=3),
    "online_norm scale": partial(backward.online_norm, control="scale"),
    "moving_average_batch_norm long": partial(backward.moving_average_batch_norm, window=3),
}
GROUPED = ("batch_group_norm", "group_norm", "evonorm_s0", "power_norm")
WHITENING = ("decorrelated_batch_norm", "iterative_norm")
EVERY = pytest.mark.parametrize("name", EQUATIONS)


def case_of(name, channels=4, ghost=None):
    """The case for this many channels: groups of two of them, or of one where there is an odd
    number; `ghost` examples in a group, of those that have groups.
    """
    fields = {}
    if name in GROUPED:
        fields["groups"] = 1 if channels % 2 else 2
    if name in WHITENING:
        fields["size"] = 1 if channels % 2 else 2
    if ghost and hasattr(NORMS[name], "ghost_size"):
        fields["ghost"] = ghost
    return EQUATIONS[name](**fields)


def test_every_normalizer_has_its_equations():
    assert set(EQUATIONS) == set(NORMS)
    for name in EQUATIONS:
        assert type(case_of(name).module) is NORMS[name]


@EVERY
def test_it_is_the_equations_in_double_precision(name):
    """To twelve digits: a misplaced ε, 10⁻⁵ in relation, would show."""
    steps = 5 if name == "moving_average_batch_norm" else 3  # the window fills, r is corrected
    assert_follows(case_of(name), (3, 2, 3, 4), "float64", steps=steps)


@pytest.mark.parametrize("name", VARIANTS)
def test_its_other_forms_are_the_equations_too(name):
    assert_follows(VARIANTS[name](), (3, 2, 3, 4), "float64")


MASKS = {
    "all": np.ones((6, 5), bool),
    "random": np.random.default_rng(1).uniform(size=(6, 5)) < 0.6,
    "examples": np.arange(6)[:, None] != np.full(5, 4),
    "a group and positions": np.random.default_rng(2).uniform(size=(6, 5)) < 0.8,
    "one value": np.ones((6, 5), bool),
}
MASKS["a group and positions"][2:4] = False
MASKS["one value"][2:4] = False
MASKS["one value"][3, 1] = True


@EVERY
def test_what_is_masked_is_not_in_the_equations(name):
    """Groups of two examples, of which all, some, none or one value may count."""
    masks = [m for kind, m in MASKS.items() if kind != "one value" or name not in WHITENING]
    assert_follows(case_of(name, ghost=2), (6, 5, 4), "float32", masks=masks)


@EVERY
def test_of_two_axes_in_bfloat16(name):
    assert_follows(case_of(name, channels=8), (9, 8), "bfloat16", steps=2)


@pytest.mark.slow
@EVERY
def test_one_example_of_five_axes_in_float16(name):
    assert_follows(case_of(name), (1, 2, 1, 3, 4), "float16")


@pytest.mark.slow
@EVERY
def test_one_channel_of_one_position(name):
    assert_follows(case_of(name, channels=1), (5, 1, 1), "float32")


@EVERY
@settings(max_examples=5)
@given(
    values=arrays(np.float64, (3, 2, 3, 4), elements=st.floats(-10, 10, width=32)),
    offset=st.floats(-10, 10),
)
def test_any_values(name, values, offset):
    """Equal ones and zeros among them, where ε alone is the divisor."""
    case, x = case_of(name), values + offset
    with jax.enable_x64(True):
        module = widened(case.module)
        variables = start(module, jnp.zeros(x.shape))
        y, _, _, after, _ = stepper(module)(variables, jnp.asarray(x), jnp.ones(x.shape), None)
    params, state = numpy64(variables["params"]), numpy64(variables["batch_stats"])
    expected, state = case.forward(params, state, x, None, True)
    # Whitening divides by √ε ≈ 0.003 along a direction without spread, others up to 30 off.
    limit = 1e-3 if name in WHITENING else 1e-9
    np.testing.assert_allclose(y, expected, rtol=limit, atol=limit)
    for key, value in after["batch_stats"].items():
        if key in state and not key.startswith("backward_"):
            np.testing.assert_allclose(value, state[key], rtol=limit, atol=limit, err_msg=key)


@st.composite
def shaped(draw):
    """(shape, ghost size, mask or none, seed): few, odd and single ones of each axis."""
    positions = draw(st.lists(st.integers(1, 3), max_size=3))
    examples, channels = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    ghost = draw(st.sampled_from([None, *(k for k in (1, 2, 3) if examples % k == 0)]))
    seed, mask = draw(st.integers(0, 10**6)), None
    if draw(st.booleans()):
        share = draw(st.sampled_from([0.5, 0.8]))
        mask = np.random.default_rng(seed).uniform(size=(examples, *positions)) < share
        mask[0, ...] = True  # a batch of nothing is the contract's
    return (examples, *positions, channels), ghost, mask, seed


@pytest.mark.slow
@EVERY
@settings(max_examples=8)
@given(drawn=shaped())
def test_any_shape_and_mask(name, drawn):
    shape, ghost, mask, seed = drawn
    case = case_of(name, shape[-1], ghost)
    assert_follows(case, shape, "float64", masks=[mask], seed=seed, room=2**14)


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 5, 3, 4), (9, 1, 1, 8), (7, 5, 1), (2, 2, 3, 3, 4)], ids=str)
def test_one_example_position_or_channel_in_short_formats(name, dtype, shape):
    assert_follows(case_of(name, shape[-1]), shape, dtype)
