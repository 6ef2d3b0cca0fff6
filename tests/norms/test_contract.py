"""What every normalizer promises, whatever it computes (docs/architecture.md, "The contract")."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from normlab.norms import NORMS

SMALL = {
    "group_norm": {"num_groups": 2},
    "batch_group_norm": {"num_groups": 2},
    "evonorm_s0": {"num_groups": 2},
    "batch_layer_norm": {"running_variance": "biased"},
    "online_norm": {"control": "none"},  # what holds its output comes after scale and bias
}
START_AT_ONE = ("var", "sigma", "feature_var", "second_moment")
NO_SQUARES = ("l1_batch_norm", "mean_only_batch_norm")  # 1e30 is a value like any other to them
EXTRAS = {
    "switchable_norm": {"mean_weight": (3,), "var_weight": (3,)},
    "filter_response_norm": {"tau": (4,)},
    "evonorm_b0": {"v": (4,)},
    "evonorm_s0": {"v": (4,)},
    "proxy_norm": {"proxy_scale": (4,), "proxy_bias": (4,)},
    "dyt": {"alpha": ()},
    "derf": {"alpha": (), "shift": ()},
}
"""Parameters beyond scale and bias, of four channels."""
EVERY = pytest.mark.parametrize("name", list(NORMS))
GROUPED = pytest.mark.parametrize(
    "name", [name for name, cls in NORMS.items() if hasattr(cls, "num_groups")]
)
STATEFUL = pytest.mark.parametrize("name", [name for name, cls in NORMS.items() if cls.stateful])


def make(name, **fields):
    return NORMS[name](**SMALL.get(name, {}), **fields)


def values(shape=(8, 5, 5, 4), seed=0, dtype=jnp.float32):
    return (jax.random.normal(jax.random.key(seed), shape) * 2 + 1).astype(dtype)


def start(module, x):
    return module.init(jax.random.key(0), x, train=True)


def train(module, variables, x, mask=None):
    y, updated = module.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])
    return y, {**variables, **updated}


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda p, q: bool(jnp.array_equal(p, q)), a, b))


@EVERY
def test_train_is_a_required_keyword(name):
    parameters = inspect.signature(NORMS[name].__call__).parameters
    assert parameters["train"].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["train"].default is inspect.Parameter.empty
    assert parameters["mask"].default is None


@EVERY
def test_init_leaves_the_state_as_it_starts(name):
    module = make(name)
    trained = start(module, values()).get("batch_stats", {})
    evaluated = module.init(jax.random.key(0), values(seed=1), train=False).get("batch_stats", {})
    assert equal(trained, evaluated)
    for key, array in trained.items():
        if key == "whitening":
            np.testing.assert_array_equal(array, np.eye(4)[None])
            continue
        start_value = 1 if key in START_AT_ONE else 0
        np.testing.assert_array_equal(array, np.full(array.shape, start_value))


@EVERY
def test_a_training_step_moves_exactly_the_stateful_ones(name):
    module = make(name)
    variables = start(module, values())
    _, after = train(module, variables, values())
    assert ("batch_stats" in variables) == NORMS[name].stateful
    assert equal(variables, after) == (not NORMS[name].stateful)


@EVERY
def test_evaluation_moves_nothing_and_depends_on_no_other_example(name):
    module = make(name)
    x = values()
    _, variables = train(module, start(module, x), x)
    whole, state = module.apply(variables, x, train=False, mutable=["batch_stats"])
    assert equal(state.get("batch_stats", {}), variables.get("batch_stats", {}))
    single = module.apply(variables, x[:1], train=False)
    np.testing.assert_allclose(single[0], whole[0], atol=1e-5)


@EVERY
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_output_keeps_the_inputs_dtype_and_the_state_is_float32(name, dtype):
    module = make(name)
    x = values(dtype=dtype)
    variables = start(module, x)
    y, after = train(module, variables, x)
    assert y.dtype == dtype
    assert y.shape == x.shape
    for array in jax.tree.leaves(after.get("batch_stats", {})):
        assert array.dtype in (jnp.float32, jnp.int32)
    assert module.apply(variables, x, train=False).dtype == dtype


@EVERY
def test_dtype_decides_the_outputs(name):
    if name == "none":
        pytest.skip("the identity has no dtype")
    module = make(name, dtype="bfloat16")
    x = values()
    assert train(module, start(module, x), x)[0].dtype == jnp.bfloat16


@EVERY
@pytest.mark.parametrize("shape", [(6, 4), (6, 7, 4), (3, 2, 4, 4, 4)], ids=str)
def test_any_number_of_positions(name, shape):
    module = make(name)
    x = values(shape)
    y, _ = train(module, start(module, x), x)
    assert y.shape == shape
    assert bool(jnp.isfinite(y).all())


@EVERY
def test_a_mask_of_all_true_changes_nothing(name):
    module = make(name)
    x = values()
    variables = start(module, x)
    plain, state = train(module, variables, x)
    for shape in ((8,), (8, 5), (8, 5, 5)):
        masked, masked_state = train(module, variables, x, jnp.ones(shape, bool))
        np.testing.assert_allclose(masked, plain, atol=2e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), masked_state, state)


@EVERY
@pytest.mark.parametrize("padding", [0.0, 1e6, np.nan, np.inf])
def test_masked_examples_touch_nothing_whatever_they_hold(name, padding):
    """Six real examples and two of padding: the six come out as if they were alone."""
    module = make(name)
    x = values()
    variables = start(module, x)
    alone, alone_state = train(module, variables, x[:6])
    padded = x.at[6:].set(padding)
    y, state = train(module, variables, padded, jnp.arange(8) < 6)
    np.testing.assert_allclose(y[:6], alone, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, alone_state)
    if name != "none":
        assert bool(jnp.isfinite(y).all())


@EVERY
def test_masked_positions_touch_nothing(name):
    """Statistics over the left three columns only: the right two may hold anything."""
    if name == "none":
        pytest.skip("the identity has no statistics")
    module = make(name)
    x = values()
    variables = start(module, x)
    mask = jnp.zeros((8, 5, 5), bool).at[:, :, :3].set(True)
    one, state_one = train(module, variables, x, mask)
    two, state_two = train(module, variables, x.at[:, :, 3:].set(-50.0), mask)
    np.testing.assert_allclose(one[:, :, :3], two[:, :, :3], atol=1e-5)
    assert equal(state_one, state_two)


@EVERY
def test_gradients_do_not_reach_what_is_masked_and_are_finite(name):
    module = make(name)
    x = values().at[6:].set(jnp.nan)
    mask = jnp.arange(8) < 6
    variables = start(module, values())

    def loss(x):
        y, _ = train(module, variables, x, mask)
        return jnp.sum(jnp.sin(y[:6]))

    gradient = jax.jit(jax.grad(loss))(x)
    assert bool(jnp.isfinite(gradient).all())
    np.testing.assert_array_equal(gradient[6:], np.zeros_like(gradient[6:]))


@EVERY
def test_a_batch_that_is_masked_whole_is_finite_and_changes_no_state(name):
    module = make(name)
    x = values()
    _, variables = train(module, start(module, x), x)
    y, after = train(module, variables, x, jnp.zeros(8, bool))
    assert bool(jnp.isfinite(y).all())
    assert equal(variables, after)


@STATEFUL
def test_a_group_of_nothing_is_normalized_by_the_running_statistics(name):
    module = make(name)
    x = values()
    _, variables = train(module, start(module, x), x)
    y, _ = train(module, variables, x, jnp.zeros(8, bool))
    np.testing.assert_allclose(y, module.apply(variables, x, train=False), atol=1e-5)


@STATEFUL
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_one_bad_value_in_one_channel_leaves_the_whole_state(name, bad):
    """1e30 squared is more than float32 holds: the variance is infinite though the mean is not."""
    if name in NO_SQUARES and bad == 1e30:
        pytest.skip("nothing overflows")
    module = make(name)
    x = values()
    _, variables = train(module, start(module, x), x)
    _, after = train(module, variables, x.at[0, 0, 0, 0].set(bad))
    assert equal(variables, after)
    _, later = train(module, after, x)  # and the next good batch moves it again
    assert not equal(after, later)


@STATEFUL
def test_it_can_be_initialized_on_any_dummy_batch(name):
    scopes = ({"stats_scope": "ghost", "ghost_size": 4}, {"stats_scope": "device"})
    scoped = hasattr(NORMS[name], "stats_scope")
    for scope in scopes if scoped else ({},):
        fields = {**scope, "axis_name": "batch"} if scoped else {}
        module = make(name, use_scale=True, **fields)
        variables = start(module, values((3, 5, 5, 4)))
        assert variables["params"]["scale"].shape == (4,)


@STATEFUL
def test_population_moments_have_a_state_that_stands_for_them(name):
    """Applied to the moments of a batch, it gives the state under which inference is training."""
    module = make(name)
    x = values()
    _, variables = train(module, start(module, x), x)  # counters are kept
    trained, sown = module.apply(variables, x, train=True, mutable=["batch_stats", "batch_moments"])
    state = module.state_from_moments(sown["batch_moments"]["moments"])
    assert set(state) <= set(variables["batch_stats"])
    stats = {**variables["batch_stats"], **state}
    y = module.apply({**variables, "batch_stats": stats}, x, train=False)
    np.testing.assert_allclose(y, trained, atol=2e-5)


@EVERY
def test_moments_are_left_only_when_asked_for(name):
    module = make(name)
    x = values()
    _, updated = module.apply(start(module, x), x, train=True, mutable=["batch_stats"])
    assert "batch_moments" not in updated


@EVERY
def test_parameters_are_scale_and_bias_by_channel(name):
    if name == "none":
        assert start(make(name), values()) == {}
        return
    both = start(make(name, use_scale=True, use_bias=True), values())["params"]
    extras = EXTRAS.get(name, {})
    shapes = {key: array.shape for key, array in both.items()}
    assert shapes == {"scale": (4,), "bias": (4,)} | extras
    neither = start(make(name, use_scale=False, use_bias=False), values())
    assert set(neither.get("params", {})) == set(extras)


@EVERY
def test_scale_and_bias_act_last(name):
    if name == "none":
        pytest.skip("the identity has no parameters")
    # A threshold and a proxy come after them: without an activation there is neither.
    linear = {"activation": None} if name in ("filter_response_norm", "proxy_norm") else {}
    module = make(name, use_scale=True, use_bias=True, **linear)
    x = values()
    variables = start(module, x)
    plain, _ = train(module, variables, x)
    scale, bias = jnp.asarray([1.0, 2, 3, 4]), jnp.asarray([0.0, 1, 0, -1])
    moved = {**variables, "params": {**variables["params"], "scale": scale, "bias": bias}}
    np.testing.assert_allclose(train(module, moved, x)[0], plain * scale + bias, atol=1e-5)


@EVERY
def test_derivatives_agree_with_differences_forward_and_backward(name):
    with jax.enable_x64(True):
        module = make(name)
        x = jax.random.normal(jax.random.key(0), (4, 3, 4), jnp.float64)
        variables = jax.tree.map(
            lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a, start(module, x)
        )
        if any(key.startswith("backward_") for key in variables.get("batch_stats", {})):
            pytest.skip("its gradient is defined, by running statistics, and is no derivative")

        def f(params, x):
            y, _ = module.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            return jnp.sin(y)

        params = variables.get("params", {})
        if name == "batch_renorm":  # r and d carry no gradient, so differences see more: hold them
            module = make(name, r_max=1.0, d_max=0.0)
        check_grads(jax.jit(f), (params, x), order=1, modes=("fwd", "rev"))


@EVERY
def test_every_field_has_a_comment_that_gives_its_meaning(name):
    from normlab.meanings import meanings
    from normlab.norms import FACTORY_FIELDS

    skipped = {"name", "parent", "scale_init", "bias_init", *FACTORY_FIELDS}
    fields = {field.name for field in dataclasses.fields(NORMS[name])} - skipped
    classes = [cls for cls in NORMS[name].__mro__ if cls.__module__.startswith("normlab.")]
    found = {field for cls in classes for field, meaning in meanings(cls).items() if meaning}
    assert fields - found == set()


@EVERY
def test_the_module_names_its_source(name):
    text = inspect.getmodule(NORMS[name]).__doc__
    assert name == "none" or "arXiv:" in text


@GROUPED
def test_groups_that_do_not_divide_the_channels_are_settled_and_said(name):
    module = NORMS[name](num_groups=3, strict=False)
    assert module.note(4) == "num_groups 3 does not divide 4 channels: 2 groups"
    assert module.note(6) == ""
    assert start(module, values((2, 3, 3, 4)))
    with pytest.raises(ValueError, match="num_groups 3 does not divide 4 channels"):
        start(NORMS[name](num_groups=3), values((2, 3, 3, 4)))
