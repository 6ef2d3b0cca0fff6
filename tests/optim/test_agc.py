"""Adaptive gradient clipping: what a unit is, and what is left of its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from normlab.config import load_config
from normlab.errors import UserError
from normlab.optim import adaptive_grad_clip, units
from normlab.training.parallel import Compiler
from normlab.training.setup import build_parts
from normlab.training.state import create_state


def clip(gradients, params, clipping, epsilon=1e-3, **how):
    transformation = adaptive_grad_clip(clipping, epsilon, **how)
    return transformation.update(gradients, transformation.init(params), params)


def dense(kernel, bias=None):
    layer = {"kernel": jnp.asarray(kernel, jnp.float32)}
    if bias is not None:
        layer["bias"] = jnp.asarray(bias, jnp.float32)
    return {"dense": layer}


def random_like(params, seed, size=1.0):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten(
        [size * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


# By hand -----------------------------------------------------------------------------------------


def test_each_column_of_a_dense_kernel_is_clipped_by_its_own_norm():
    # Units (3, 4), (0, 1), (0, 0): norms 5, 1, 0. λ = 0.1 and ε = 0.5: limits 0.5, 0.1, 0.05.
    params = dense([[3.0, 0.0, 0.0], [4.0, 1.0, 0.0]])
    # Gradients (6, 8), (0.06, 0.08), (0.3, 0.4): norms 10, 0.1, 0.5.
    gradients = dense([[6.0, 0.06, 0.3], [8.0, 0.08, 0.4]])
    got, state = clip(gradients, params, 0.1, 0.5)
    # 0.5/10 of the first, the second as it is (not above its limit), 0.05/0.5 of the third.
    expected = [[0.3, 0.06, 0.03], [0.4, 0.08, 0.04]]
    np.testing.assert_allclose(got["dense"]["kernel"], expected, rtol=1e-6)
    assert float(state.clipped["dense/kernel"]) == pytest.approx(2 / 3)


def test_a_bias_is_one_unit():
    # ‖b‖ = 5, λ = 0.1: limit 0.5; ‖g‖ = 2.
    params = dense(np.ones((2, 2)), [3.0, 4.0])
    got, state = clip(dense(np.zeros((2, 2)), [0.0, 2.0]), params, 0.1)
    np.testing.assert_allclose(got["dense"]["bias"], [0, 0.5], rtol=1e-6)
    assert float(state.clipped["dense/bias"]) == 1


def test_the_classifiers_weight_is_left_alone_and_its_bias_is_not():
    params = {"head": dense(np.ones((2, 2)), [1.0, 1.0])["dense"]}
    gradients = {"head": dense(np.full((2, 2), 100.0), [100.0, 100.0])["dense"]}
    got, state = clip(gradients, params, 0.01)
    np.testing.assert_array_equal(got["head"]["kernel"], gradients["head"]["kernel"])
    assert float(jnp.abs(got["head"]["bias"]).max()) < 1
    assert set(state.clipped) == {"head/bias"}


# Invariants --------------------------------------------------------------------------------------


PARAMS = random_like(
    {
        "conv": {"kernel": np.zeros((3, 3, 4, 8)), "bias": np.zeros(8), "gain": np.zeros(8)},
        "dense": {"kernel": np.zeros((5, 6))},
        "skip_gain": np.zeros(()),
    },
    0,
)


def norms(tree):
    found = units(tree, 1.0)
    flat = {"/".join(k.key for k in path): x for path, x in jax.tree.flatten_with_path(tree)[0]}
    return {
        path: np.sqrt(np.sum(np.square(np.asarray(flat[path])), unit.axes))
        for path, unit in found.items()
    }


def test_without_limit_it_is_the_identity():
    gradients = random_like(PARAMS, 1)
    got, state = clip(gradients, PARAMS, np.inf)
    jax.tree.map(np.testing.assert_array_equal, got, gradients)
    assert all(float(x) == 0 for x in state.clipped.values())


@pytest.mark.parametrize("clipping", [0.01, 0.1, 1.0])
def test_no_unit_is_above_its_limit_directions_stay_and_twice_is_once(clipping):
    gradients = random_like(PARAMS, 1)
    once, _ = clip(gradients, PARAMS, clipping)
    after, weights, before = norms(once), norms(PARAMS), norms(gradients)
    for path in before:
        limit = clipping * np.maximum(weights[path], 1e-3)
        assert (after[path] <= limit * (1 + 1e-6)).all()
        # What was below its limit is as it was.
        np.testing.assert_allclose(after[path], np.minimum(before[path], limit), rtol=1e-5)
    # Directions: each unit's gradient is its old one times one number, its cosine with it 1.
    inner = norms(jax.tree.map(lambda a, b: jnp.sqrt(jnp.maximum(a * b, 0)), once, gradients))
    for path in before:
        cosine = inner[path] ** 2 / (after[path] * before[path])
        np.testing.assert_allclose(cosine, 1, rtol=1e-5)
    signs = jax.tree.map(lambda a, b: bool((a * b >= 0).all()), once, gradients)
    assert jax.tree.all(signs)
    twice, _ = clip(once, PARAMS, clipping)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), twice, once)


def test_weights_of_zero_may_still_move_by_epsilon_and_a_gradient_of_zero_stays():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    got, _ = clip(random_like(PARAMS, 1), zeros, 0.01)
    for norm in norms(got).values():  # λ·ε = 1e-5
        np.testing.assert_allclose(norm, np.full_like(norm, 1e-5), rtol=1e-4)
    still, state = clip(zeros, PARAMS, 0.01)
    jax.tree.map(np.testing.assert_array_equal, still, zeros)
    assert all(float(x) == 0 for x in state.clipped.values())


# Units -------------------------------------------------------------------------------------------


def initialized(module, x):
    return module.init(jax.random.key(0), x)["params"]


@pytest.mark.parametrize(
    ("module", "shape", "axes"),
    [
        (nn.Dense(4), (2, 3), (0,)),
        (nn.Conv(4, (3,)), (2, 8, 3), (0, 1)),
        (nn.Conv(4, (3, 3)), (2, 8, 8, 3), (0, 1, 2)),
        (nn.Conv(4, (3, 3, 3)), (1, 4, 4, 4, 3), (0, 1, 2, 3)),
        (nn.Conv(6, (3, 3), feature_group_count=3), (2, 8, 8, 3), (0, 1, 2)),  # depthwise
        (nn.Conv(8, (3, 3), feature_group_count=2), (2, 8, 8, 4), (0, 1, 2)),  # grouped
    ],
    ids=["dense", "1-D", "2-D", "3-D", "depthwise", "grouped"],
)
def test_a_kernels_units_are_its_outputs(module, shape, axes):
    params = {"layer": initialized(module, jnp.zeros(shape))}
    found = units(params, 0.01)
    assert found["layer/kernel"].axes == axes
    assert found["layer/bias"].axes == (0,)


def test_each_feature_of_each_head_is_a_unit():
    net = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)
    found = units({"attention": initialized(net, jnp.zeros((1, 4, 8)))}, 0.01)
    for name in ("query", "key", "value"):  # [8 inputs, 2 heads, 3 features]
        assert found[f"attention/{name}/kernel"].axes == (0,)
        assert found[f"attention/{name}/bias"].axes == (0, 1)
    assert found["attention/out/kernel"].axes == (0, 1)  # [2 heads, 3 features, 8 outputs]


def test_a_scalar_of_a_block_is_one_unit():
    block = {"skip_gain": np.zeros(()), "bias1a": np.zeros(1), "conv": {"kernel": np.zeros((2, 3))}}
    found = units({"block": block}, 0.01)
    assert found["block/skip_gain"] == ((), 0.01, "skip_gain: one unit")
    assert found["block/bias1a"] == ((0,), 0.01, "bias: one unit")


def test_stacked_parameters_are_clipped_one_by_one():
    """Layers of a scan and seeds under vmap: the same as each alone."""
    stack = jax.tree.map(
        lambda *parts: jnp.stack(parts), *[random_like(PARAMS, seed) for seed in (0, 1, 2)]
    )
    gradients = jax.tree.map(
        lambda *parts: jnp.stack(parts), *[random_like(PARAMS, seed) for seed in (3, 4, 5)]
    )
    together, _ = clip(gradients, stack, 0.1, stacked=(("*", 1),))
    for i in range(3):
        one = [jax.tree.map(lambda x, i=i: x[i], tree) for tree in (gradients, stack, together)]
        alone, _ = clip(one[0], one[1], 0.1)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one[2], alone)
    # Unsaid, a stack of biases would be one unit.
    mistaken, _ = clip(gradients, stack, 0.1)
    assert not np.allclose(mistaken["conv"]["bias"], together["conv"]["bias"])


def test_groups_have_a_limit_of_their_own_and_the_last_that_fits_holds():
    params = {"stage1": PARAMS, "stage2": PARAMS}
    found = units(params, 0.01, groups=(("stage2/*", 0.1), ("*/dense/kernel", 0.5)))
    assert found["stage1/conv/kernel"].clipping == 0.01
    assert found["stage2/conv/kernel"].clipping == 0.1
    assert found["stage2/dense/kernel"].clipping == 0.5
    assert units(params, 0.01, exclude=("stage1/*",))["stage1/conv/bias"].clipping is None


# Optax -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kernel",
    [(5, 6), (3, 3, 4, 8), (3, 3, 1, 6), (3, 3, 3, 4, 8)],
    ids=["dense", "2-D", "depthwise", "3-D"],
)
def test_it_agrees_with_optax_where_that_one_knows_what_a_unit_is(kernel):
    params = random_like({"layer": {"kernel": np.zeros(kernel), "bias": np.zeros(8)}}, 0)
    gradients = random_like(params, 1)
    theirs = optax.adaptive_grad_clip(0.05)
    expected, _ = theirs.update(gradients, theirs.init(params), params)
    got, _ = clip(gradients, params, 0.05)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)


@pytest.mark.parametrize(
    ("name", "kernel", "stacked"),
    [
        ("layer", (3, 4, 8), 0),
        ("layer", (2, 5, 6), 1),
        ("layer", (2, 3, 3, 4, 8), 1),
        ("layer", (1, 1, 1, 8), 0),
        ("out", (2, 3, 8), 0),
    ],
    ids=["1-D", "scanned dense", "scanned 2-D", "of one input", "after heads"],
)
def test_and_not_where_that_one_goes_by_rank(name, kernel, stacked):
    """It takes rank 3 for [inputs, heads, features], rank 5 for 3-D, and one input for a bias."""
    params = random_like({name: {"kernel": np.zeros(kernel)}}, 0)
    gradients = random_like(params, 1)
    theirs = optax.adaptive_grad_clip(0.05)
    expected, _ = theirs.update(gradients, theirs.init(params), params)
    got, _ = clip(gradients, params, 0.05, stacked=(("*", stacked),))
    assert not np.allclose(got[name]["kernel"], expected[name]["kernel"], rtol=1e-3)


def test_it_agrees_with_optax_on_projections_to_heads():
    params = random_like({"attention": {"query": {"kernel": np.zeros((8, 2, 3))}}}, 0)
    gradients = random_like(params, 1)
    theirs = optax.adaptive_grad_clip(0.05)
    expected, _ = theirs.update(gradients, theirs.init(params), params)
    got, _ = clip(gradients, params, 0.05)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)


def test_layers_of_a_real_scan_are_clipped_one_by_one():
    """`nn.scan` stacks kernel [3, 4, 4] and bias [3, 4]; each layer is as it is alone."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(4, name="dense")(x), None

    scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    params = scan(name="layers").init(jax.random.key(0), jnp.ones((2, 4)), None)["params"]
    assert params["dense"]["kernel"].shape == (3, 4, 4)
    gradients = random_like(params, 1)
    together, _ = clip(gradients, params, 0.1, stacked=(("*", 1),))
    for i in range(3):
        alone, _ = clip(*(jax.tree.map(lambda x, i=i: x[i], t) for t in (gradients, params)), 0.1)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-6), together, alone
        )


# In a run ----------------------------------------------------------------------------------------


def config_of(**fields):
    names = {f"optim.{name}": value for name, value in fields.items()}
    return load_config("configs/digits.py:model=mlp", {"model.widths": (4,), **names})


def test_a_run_clips_before_decay_and_momentum_and_logs_what_it_clipped():
    parts = build_parts(config_of(agc_clipping=0.01, weight_decay=0.1, momentum=0.0))
    state = create_state(parts, Compiler())
    gradients = jax.tree.map(lambda w: 100 * jnp.ones_like(w), state.params)
    direction, _ = parts.direction.update(gradients, state.opt_state, state.params)
    clipped, _ = clip(gradients, state.params, 0.01)
    kernel = state.params["dense1"]["kernel"]
    expected = clipped["dense1"]["kernel"] + 0.1 * kernel
    np.testing.assert_allclose(direction["dense1"]["kernel"], expected, rtol=1e-5)
    assert {"dense1/kernel/clipped", "head/bias/clipped"} <= set(state.totals.measures)
    assert "head/kernel/clipped" not in state.totals.measures
    assert not create_state(build_parts(config_of()), Compiler()).totals.measures


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"agc_clipping": 0.0}, "'optim.agc_clipping' = 0.0 must be above 0"),
        ({"agc_epsilon": 0.0, "agc_clipping": 0.1}, "'optim.agc_epsilon' = 0.0 must be above 0"),
        ({"agc_exclude": ("haed/kernel",)}, "'haed/kernel'.*'head/kernel'"),
        ({"agc_groups": ("dense1/*",)}, r"has 'dense1/\*', which is not pattern=λ"),
        ({"agc_groups": ("dense1/*=-1",)}, "which is not pattern=λ with λ above 0"),
        ({"agc_groups": ("dens1/kernel=1",)}, "'dens1/kernel'.*'dense1/kernel'"),
    ],
    ids=str,
)
def test_what_fits_nothing_is_refused_in_one_line(fields, message):
    with pytest.raises(UserError, match=message):
        build_parts(config_of(**fields), need_data=False)


def test_a_dense_layer_called_query_has_units_by_output():
    found = units({"query": {"kernel": jnp.zeros((5, 8))}}, 0.01)
    assert found["query/kernel"].axes == (0,)
    heads = units({"query": {"kernel": jnp.zeros((5, 2, 4))}}, 0.01)
    assert heads["query/kernel"].axes == (0,)
    with pytest.raises(ValueError, match="query/kernel has 2 axes; it cannot have 3 stacked"):
        units({"query": {"kernel": jnp.zeros((5, 8))}}, 0.01, stacked=[("*", 3)])
