"""Recurrent cells against float64 references written from the papers' equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from flax.core import FrozenDict

from normlab.models.conv import StandardConv
from normlab.models.recurrent import CELLS, PLACES, Recurrence
from normlab.norms import NORMS, NormFactory, join_state, split_state

N, T, F, H = 6, 5, 3, 4
EPSILON = 1e-5


def layer_of(norm="batch_norm", cell="lstm", statistics="per_step", fields=None, **settings):
    """Returns a layer of 4 units."""
    make_cell = functools.partial(
        CELLS[cell],
        features=H,
        norm=NormFactory(NORMS[norm], FrozenDict(fields or {})),
        conv=StandardConv(),
        **settings,
    )
    return Recurrence(make_cell, StandardConv(), statistics)


def sequences(seed=0, steps=T, examples=N):
    return jax.random.normal(jax.random.key(seed), (examples, steps, F))


def start(layer, steps=T):
    """Returns variables whose parameters are all drawn, none at its start."""
    draw = jax.jit(functools.partial(layer.init, train=False))
    variables = draw(jax.random.key(1), sequences(steps=steps))
    rng = np.random.default_rng(2)
    drawn = jax.tree.map(
        lambda a: jnp.asarray(a + rng.normal(0, 0.3, a.shape), a.dtype), variables["params"]
    )
    return {**variables, "params": drawn}


# The equations -----------------------------------------------------------------------------------


def standardized(kind, values):
    """[N, C] over examples (batch_norm) or features (layer_norm), biased variance."""
    if kind == "none":
        return values
    axis = 0 if kind == "batch_norm" else 1
    mean, var = values.mean(axis, keepdims=True), values.var(axis, keepdims=True)
    return (values - mean) / np.sqrt(var + EPSILON)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def reference(params, x, kind, cell="lstm", places=PLACES):
    """Returns hidden states [N, T, H], and what each normalizer was given, by step."""
    seen = {place: [] for place in PLACES}

    def normalize(place, values):
        if place not in places or kind == "none":
            return values
        seen[place].append(values)
        own = params["cell"][f"norm_{place}"]
        return standardized(kind, values) * own["scale"] + own.get("bias", 0)

    h, c, hidden = np.zeros((len(x), H)), np.zeros((len(x), H)), []
    for t in range(x.shape[1]):
        z = normalize("hidden", h @ params["cell"]["hidden"]["kernel"])
        z = z + normalize("input", x[:, t] @ params["input"]["kernel"]) + params["cell"]["bias"]
        if cell == "simple":
            h = np.tanh(z)
        else:
            f, i, o, g = np.split(z, 4, -1)  # Cooijmans et al., equation 6
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)  # 7
            h = sigmoid(o) * np.tanh(normalize("cell", c))  # 8
        hidden.append(h)
    return np.stack(hidden, 1), {k: np.stack(v) for k, v in seen.items() if v}


@pytest.mark.parametrize(
    ("norm", "cell", "places"),
    [
        ("batch_norm", "lstm", PLACES),
        ("layer_norm", "lstm", PLACES),
        pytest.param("none", "lstm", PLACES, marks=pytest.mark.slow),
        pytest.param("batch_norm", "simple", PLACES, marks=pytest.mark.slow),
        ("layer_norm", "simple", ("hidden",)),
        ("batch_norm", "lstm", ("input",)),  # Laurent et al. 2015
    ],
)
def test_outputs_and_gradients_are_the_papers(norm, cell, places):
    with jax.enable_x64(True):
        fields = {"param_dtype": "float64"} if norm != "none" else {}
        layer = layer_of(norm, cell, fields=fields, normalized=places, dtype="float64")
        variables = jax.tree.map(lambda a: a.astype("float64"), start(layer))
        x = sequences().astype("float64")
        weights = np.random.default_rng(3).normal(size=(N, T, H))

        def loss(params):
            y, _ = layer.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            return (y * weights).sum(), y

        gradient, y = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
        gradient = jax.tree.map(np.asarray, gradient)
    params, x = jax.tree.map(np.asarray, variables["params"]), np.asarray(x)
    expected, _ = reference(params, x, norm, cell, places)
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-10)

    rng, step = np.random.default_rng(4), 1e-6
    for path, leaf in traverse_util.flatten_dict(params).items():
        direction = rng.normal(size=leaf.shape)

        def moved(by, path=path, direction=direction):
            flat = traverse_util.flatten_dict(params)
            flat[path] = flat[path] + by * direction
            there, _ = reference(traverse_util.unflatten_dict(flat), x, norm, cell, places)
            return (there * weights).sum()

        slope = (moved(step) - moved(-step)) / (2 * step)
        found = (traverse_util.flatten_dict(gradient)[path] * direction).sum()
        np.testing.assert_allclose(found, slope, rtol=1e-5, atol=1e-6, err_msg=str(path))


def test_each_step_has_running_statistics_of_its_own():
    """Three updates from 0 and 1 with momentum 0.9, step by step."""
    layer = layer_of()
    variables = start(layer)
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    mean, var = {p: 0.0 for p in PLACES}, {p: 1.0 for p in PLACES}
    update = jax.jit(lambda v, x: layer.apply(v, x, train=True, mutable=["batch_stats"])[1])
    for seed in range(3):
        x = sequences(seed)
        variables = {**variables, **update(variables, x)}
        _, seen = reference(params, np.asarray(x, np.float64), "batch_norm")
        for place in PLACES:
            mean[place] = 0.9 * mean[place] + 0.1 * seen[place].mean(1)
            var[place] = 0.9 * var[place] + 0.1 * seen[place].var(1)
    stats = variables["batch_stats"]["cell"]
    for place in PLACES:
        assert mean[place].shape == (T, H if place == "cell" else 4 * H)
        np.testing.assert_allclose(stats[f"norm_{place}"]["mean"], mean[place], atol=1e-5)
        np.testing.assert_allclose(stats[f"norm_{place}"]["var"], var[place], atol=1e-5)
    # The steps do differ: at the first there is no hidden state, and so no variance.
    np.testing.assert_allclose(stats["norm_hidden"]["var"][0], 0.9**3, rtol=1e-5)
    assert float(stats["norm_hidden"]["var"][4].max()) > 0.9**3 + 1e-3


def trained(layer, steps=T):
    """Returns variables with the statistics of a few batches."""
    variables = start(layer, steps)
    update = jax.jit(lambda v, x: layer.apply(v, x, train=True, mutable=["batch_stats"])[1])
    for seed in range(10, 20):
        variables = {**variables, **update(variables, 2 + sequences(seed, steps))}
    return variables


# Inference ---------------------------------------------------------------------------------------


def evaluated(layer, variables, x):
    return jax.jit(functools.partial(layer.apply, train=False))(variables, x)


def by_hand_at_inference(variables, x, stats_at):
    """Returns hidden states with the running statistics `stats_at(leaf, t)`."""
    params, stats = variables["params"], variables["batch_stats"]["cell"]
    cell = CELLS["lstm"](H, NormFactory(NORMS["batch_norm"], FrozenDict()), StandardConv())
    step = jax.jit(functools.partial(cell.apply, train=False))
    carry, hidden = cell.start(len(x)), []
    for t in range(x.shape[1]):
        own = jax.tree.map(lambda leaf, t=t: stats_at(leaf, t), stats)
        state = {"params": params["cell"], "batch_stats": own}
        carry = step(state, carry, x[:, t] @ params["input"]["kernel"])
        hidden.append(carry[0])
    return jnp.stack(hidden, 1)


@pytest.mark.parametrize("steps", [3, 5, 8])
def test_inference_uses_each_steps_statistics_and_the_last_ones_beyond(steps):
    layer = layer_of()
    variables, x = trained(layer), sequences(7, steps)
    y = evaluated(layer, variables, x)
    expected = by_hand_at_inference(variables, x, lambda leaf, t: leaf[min(t, T - 1)])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-6)


def test_shared_statistics_are_the_mean_over_steps_and_another_network():
    variables, x = trained(layer_of()), sequences(7)
    per_step = evaluated(layer_of(), variables, x)
    shared = evaluated(layer_of(statistics="shared"), variables, x)
    expected = by_hand_at_inference(variables, x, lambda leaf, _: leaf.mean(0))
    np.testing.assert_allclose(shared, expected, rtol=1e-4, atol=1e-6)
    assert float(jnp.abs(shared - per_step).max()) > 1e-3
    _, left = layer_of(statistics="shared").apply(
        variables, x, train=False, mutable=["batch_stats"]
    )
    jax.tree.map(np.testing.assert_array_equal, left["batch_stats"], variables["batch_stats"])
    update = functools.partial(layer_of(statistics="shared").apply, train=True)
    _, after = jax.jit(functools.partial(update, mutable=["batch_stats"]))(variables, x)
    means = after["batch_stats"]["cell"]["norm_input"]["mean"]
    assert means.shape == (T, 4 * H)  # training gathers them by step all the same
    assert not np.allclose(means[0], means[1], atol=1e-3)


def test_training_on_another_number_of_steps_is_refused():
    layer = layer_of()
    variables = start(layer)
    for steps in (3, 8):
        with pytest.raises(ValueError, match=f"training on {steps} steps with statistics of 5"):
            layer.apply(variables, sequences(steps=steps), train=True, mutable=["batch_stats"])
    stateless = layer_of("layer_norm")
    variables, x = start(stateless), sequences(steps=8)
    y = jax.eval_shape(lambda: stateless.apply(variables, x, train=True))
    assert y.shape == (N, 8, H)


# Masks -------------------------------------------------------------------------------------------


LENGTHS = np.array([5, 3, 1, 5, 4, 2])
PADDED = jnp.asarray(np.arange(T) < LENGTHS[:, None])


def test_padding_touches_no_statistic_no_gradient_and_no_state():
    layer = layer_of()
    variables, x = start(layer), sequences()

    def loss(params, x):
        y, new = layer.apply(
            {**variables, "params": params}, x, train=True, mask=PADDED, mutable=["batch_stats"]
        )
        return (y[:, -1] ** 2).sum(), (y, new)

    run = jax.jit(jax.grad(loss, has_aux=True))
    gradient, (y, new) = run(variables["params"], jnp.where(PADDED[..., None], x, 7.0))
    other = run(variables["params"], jnp.where(PADDED[..., None], x, jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, (gradient, (y, new)), other)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
    for example, length in enumerate(LENGTHS):
        last = y[example, length - 1]
        np.testing.assert_array_equal(y[example, length:], jnp.tile(last, (T - length, 1)))
    # Step 4 is of two examples, step 0 of all.
    gates = np.asarray(x @ variables["params"]["input"]["kernel"], np.float64)
    mean = new["batch_stats"]["cell"]["norm_input"]["mean"]
    np.testing.assert_allclose(mean[4], 0.1 * gates[[0, 3], 4].mean(0), atol=1e-6)
    np.testing.assert_allclose(mean[0], 0.1 * gates[:, 0].mean(0), atol=1e-6)


def test_a_padded_sequence_ends_as_the_short_one():
    layer = layer_of("layer_norm")
    variables, x = start(layer), sequences()
    apply = jax.jit(functools.partial(layer.apply, train=True))
    y = apply(variables, x, mask=PADDED)
    for example, length in enumerate(LENGTHS[:3]):
        alone = apply(variables, x[example : example + 1, :length])
        np.testing.assert_allclose(y[example, -1], alone[0, -1], rtol=1e-5, atol=1e-6)


def test_a_mask_of_examples_leaves_them_out_of_every_step_and_computes_them_as_the_others():
    layer = layer_of()
    variables, x = start(layer), sequences()
    mask = jnp.array([True, True, False, True, False, True])

    @jax.jit
    def run(x, mask=None):
        return layer.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])

    y, new = run(x, mask)
    _, alone = run(x[np.asarray(mask)])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), new, alone)
    assert float(jnp.abs(y[2, 4] - y[2, 3]).max()) > 1e-3


# What is injected --------------------------------------------------------------------------------


def unrolled(layer, variables, x):
    """Returns hidden states and the new state by a loop in Python over single steps."""
    params, stats = variables["params"], variables.get("batch_stats", {}).get("cell", {})
    cell, gates = layer.make_cell(parent=None), x @ params["input"]["kernel"]
    carry, hidden, new = cell.start(len(x)), [], []
    for t in range(x.shape[1]):
        own = jax.tree.map(lambda leaf, t=t: leaf[t], stats)
        carry, after = cell.apply(
            {"params": params["cell"], "batch_stats": own},
            carry,
            gates[:, t],
            train=True,
            mutable=["batch_stats"],
        )
        hidden.append(carry[0])
        new.append(after.get("batch_stats", {}))
    return jnp.stack(hidden, 1), {"cell": jax.tree.map(lambda *leaves: jnp.stack(leaves), *new)}


@pytest.mark.parametrize(
    "norm",
    [
        pytest.param("batch_renorm", marks=pytest.mark.slow),
        "power_norm",
        pytest.param("evonorm_b0", marks=pytest.mark.slow),
        pytest.param("online_norm", marks=pytest.mark.slow),
    ],
)
def test_a_layer_is_its_steps_one_after_the_other_with_any_kind_of_state(norm):
    """Counters, statistics of the backward pass, and the activation's place."""
    layer, x = layer_of(norm), sequences()
    variables = start(layer)

    def gradients(apply):
        def loss(params, backward, others):
            stats = join_state(others, backward)
            y, new = apply({"params": params, "batch_stats": stats}, x)
            return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), (y, new)

        split = split_state(variables["batch_stats"])
        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], *split)

    def in_one(variables, x):
        y, new = layer.apply(variables, x, train=True, mutable=["batch_stats"])
        return y, new["batch_stats"]

    found = gradients(in_one)
    expected = gradients(functools.partial(unrolled, layer))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), found, expected
    )
    assert all(leaf.shape[0] == T for leaf in jax.tree.leaves(variables["batch_stats"]))
    (_, backward), _ = found
    assert bool(backward) == (norm in ("power_norm", "online_norm"))


def test_a_normalizer_takes_the_activations_place_only_before_the_output():
    params = start(layer_of("evonorm_b0"))["params"]["cell"]
    assert set(params["norm_cell"]) == {"scale", "bias", "v"}
    assert set(params["norm_hidden"]) == set(params["norm_input"]) == {"scale"}


def test_the_bias_is_in_one_place_and_gains_start_at_a_tenth():
    layer = layer_of()
    params = layer.init(jax.random.key(0), sequences(), train=False)["params"]
    names = {"/".join(path) for path in traverse_util.flatten_dict(params)}
    assert names == {
        "input/kernel",
        "cell/hidden/kernel",
        "cell/bias",
        "cell/norm_hidden/scale",
        "cell/norm_input/scale",
        "cell/norm_cell/scale",
        "cell/norm_cell/bias",
    }
    for place in PLACES:
        np.testing.assert_allclose(params["cell"][f"norm_{place}"]["scale"], 0.1)
    np.testing.assert_array_equal(params["cell"]["bias"], [1.0] * H + [0.0] * 3 * H)


def test_the_recurrent_weights_of_each_gate_start_orthogonal():
    params = layer_of().init(jax.random.key(0), sequences(), train=False)["params"]
    gates = np.split(np.asarray(params["cell"]["hidden"]["kernel"]), 4, -1)
    for gate in gates:
        np.testing.assert_allclose(gate @ gate.T, np.eye(H), atol=1e-5)
    assert not np.allclose(gates[0], gates[1])


def test_bfloat16_computes_in_bfloat16_and_sums_the_cell_in_float32():
    layer = layer_of(dtype="bfloat16")
    variables = start(layer)
    apply = functools.partial(layer.apply, train=True, capture_intermediates=True)
    apply = jax.jit(functools.partial(apply, mutable=["batch_stats", "intermediates"]))
    y, sown = apply(variables, sequences().astype("bfloat16"))
    h, c = sown["intermediates"]["cell"]["__call__"][0]
    assert (y.dtype, h.dtype, c.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert h.shape == (N, T, H)  # examples first
    for leaf in jax.tree.leaves((variables, sown["batch_stats"])):
        assert leaf.dtype == jnp.float32
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    exact, _ = reference(params, np.asarray(sequences(), np.float64), "batch_norm")
    assert float(jnp.abs(y.astype("float32") - exact).max()) < 0.05
