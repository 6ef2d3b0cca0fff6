"""Normalizers with running statistics in the backward pass: their mechanism and their limits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normlab.norms import (
    BatchNorm,
    FullNorm,
    MovingAverageBatchNorm,
    OnlineNorm,
    PowerNorm,
    join_state,
    split_state,
)

SHAPE = (4, 3, 2)  # examples, positions, channels
EPSILON = 1e-5


def data(seed, shape=SHAPE):
    random = np.random.default_rng(seed)
    spread = random.uniform(0.5, 2, (shape[0], *[1] * (len(shape) - 1)))
    return random.normal(size=shape) * spread + np.arange(shape[-1])


def cotangent(seed, shape=SHAPE):
    return np.random.default_rng(100 + seed).normal(size=shape)


def stepper(module, mask=None):
    """Returns a compiled `step(variables, x, g) -> (y, gradient by x, variables after)`."""

    @jax.jit
    def step(variables, x, g):
        backward, others = split_state(variables["batch_stats"])

        def loss(x, backward):
            stats = {**variables, "batch_stats": join_state(others, backward)}
            y, updated = module.apply(stats, x, train=True, mask=mask, mutable=["batch_stats"])
            return jnp.sum(g * y), (y, updated["batch_stats"])

        (by_x, backward), (y, after) = jax.grad(loss, (0, 1), has_aux=True)(x, backward)
        return y, by_x, {**variables, "batch_stats": join_state(after, backward)}

    return step


def start(module, x=None):
    x = jnp.asarray(data(0) if x is None else x)
    return module.init(jax.random.key(0), x, train=True)


# Full normalization: what it is for --------------------------------------------------------------


def test_if_the_batch_is_the_data_set_it_is_batch_normalization_in_value_and_gradient():
    full, plain = FullNorm(), BatchNorm()
    a, b, x = start(full), start(plain), data(0).astype("f4")
    steps = stepper(full), stepper(plain)
    for _ in range(3):
        y, by_x, a = steps[0](a, x, cotangent(0).astype("f4"))
        expected, expected_by_x, b = steps[1](b, x, cotangent(0).astype("f4"))
        np.testing.assert_allclose(y, expected, atol=2e-6)
        np.testing.assert_allclose(by_x, expected_by_x, atol=2e-6)
    # And another batch is where it ends.
    other = data(1).astype("f4")
    y, by_x, _ = steps[0](a, other, cotangent(1).astype("f4"))
    expected, expected_by_x, _ = steps[1](b, other, cotangent(1).astype("f4"))
    assert np.abs(y - expected).max() > 0.05
    assert np.abs(by_x - expected_by_x).max() > 0.05


def test_at_frozen_weights_its_mean_gradient_is_that_of_the_whole_data_set():
    """x = p + w·q, a loss of x̂ alone; 16 batches of 4, shuffled anew each epoch."""
    random = np.random.default_rng(0)
    p, q, t = (jnp.asarray(random.normal(size=(64, 1)), jnp.float32) for _ in range(3))
    w = jnp.float32(0.7)
    rows = np.stack([random.permutation(64) for _ in range(150)]).reshape(-1, 4)

    def gradient(module, stats, index):
        backward, others = split_state(stats)

        def loss(w, backward):
            variables = {"batch_stats": join_state(others, backward)}
            x = p[index] + w * q[index]
            y, after = module.apply(variables, x, train=True, mutable=["batch_stats"])
            return jnp.mean(jnp.sin(2 * y + t[index])), after["batch_stats"]

        (by_w, backward), after = jax.grad(loss, (0, 1), has_aux=True)(w, backward)
        return join_state(after, backward), by_w

    def mean_gradient(module, rows):
        stats = module.init(jax.random.key(0), p[:4], train=True)["batch_stats"]
        _, found = jax.lax.scan(partial(gradient, module), stats, rows)
        return float(found[len(found) // 3 :].mean())  # once the estimates have settled

    bare = {"use_scale": False, "use_bias": False}
    exact = float(gradient(BatchNorm(**bare), start(BatchNorm(**bare), p)["batch_stats"], ...)[1])
    full = mean_gradient(FullNorm(momentum=0.995, **bare), rows)
    batch = mean_gradient(BatchNorm(**bare), rows)
    assert abs(batch - exact) > 0.05
    assert abs(full - exact) < 0.1 * abs(batch - exact)


# Limits ------------------------------------------------------------------------------------------


def test_a_window_of_one_batch_is_division_by_its_root_mean_square_with_its_derivative():
    def plain(x):
        return x / jnp.sqrt((x**2).mean((0, 1)) + EPSILON)

    x, g = data(1).astype("f4"), cotangent(1).astype("f4")
    exact = jax.grad(lambda x: jnp.sum(g * plain(x)))(x)
    for window, same in ((1, True), (2, False)):
        module = MovingAverageBatchNorm(window=window, warmup_steps=0)
        step, variables = stepper(module), start(module)
        for seed in (3, 4):
            variables = step(variables, data(seed).astype("f4"), g)[2]
        y, by_x, _ = step(variables, x, g)
        assert np.allclose(y, plain(x), atol=1e-5) == same
        assert np.allclose(by_x, exact, atol=1e-5) == same


def test_what_holds_the_output_of_online_normalization():
    x = np.full((1, 2, 2), 30.0, "f4")  # at the start the streams are 0 and 1
    y, _, _ = stepper(OnlineNorm())(start(OnlineNorm(), x), x, x)
    np.testing.assert_allclose(y, np.full_like(x, 5))
    scaled = OnlineNorm(control="scale")
    y, _, _ = stepper(scaled)(start(scaled, x), x, x)
    np.testing.assert_allclose(y, np.ones_like(x), rtol=1e-5)
    free = OnlineNorm(control="none")
    y, _, _ = stepper(free)(start(free, x), x, x)
    np.testing.assert_allclose(y, x, rtol=1e-4)
    with pytest.raises(ValueError, match="'hold' is none of clamp, scale, none"):
        start(OnlineNorm(control="hold"))


def test_group_scaling_makes_every_position_of_one_size():
    # (3, 4 | 6, 8): root mean squares √12.5 and √50, so both pairs become (0.8485, 1.1314); the
    # batch is that one position, so each channel is then divided by its own value.
    x = np.array([[3.0, 4, 6, 8]], "f4")
    scaled = PowerNorm(num_groups=2)._scaled(jnp.asarray(x))[0]
    np.testing.assert_allclose(scaled, [[0.848528, 1.131371] * 2], rtol=1e-5)
    y, _, _ = stepper(PowerNorm(num_groups=2))(start(PowerNorm(num_groups=2), x), x, x)
    np.testing.assert_allclose(y, np.ones((1, 4)), rtol=1e-4)


# The mechanism, and the edges --------------------------------------------------------------------

EVERY = pytest.mark.parametrize(
    "module",
    [
        FullNorm(),
        MovingAverageBatchNorm(window=2, warmup_steps=0, correction_start_steps=1),
        OnlineNorm(),
        PowerNorm(warmup_steps=1),
    ],
    ids=["full", "moving average", "online", "power"],
)


def test_the_state_is_split_and_joined_by_name():
    stats = {"norm": {"mean": 1, "backward_mean": 2}, "other": {"var": 3}}
    backward, others = split_state(stats)
    assert backward == {("norm", "backward_mean"): 2}
    assert others == {"norm": {"mean": 1}, "other": {"var": 3}}
    assert join_state(others, backward) == stats
    assert split_state({"other": {"var": 3}}) == ({}, {"other": {"var": 3}})


@EVERY
def test_only_a_gradient_moves_the_statistics_of_the_backward_pass(module):
    variables, x, g = start(module), data(0).astype("f4"), cotangent(0).astype("f4")
    before, _ = split_state(variables["batch_stats"])
    _, updated = module.apply(variables, x, train=True, mutable=["batch_stats"])
    for path, value in split_state(updated["batch_stats"])[0].items():
        np.testing.assert_array_equal(value, before[path])
    after, _ = split_state(stepper(module)(variables, x, g)[2]["batch_stats"])
    assert all(np.abs(after[path] - before[path]).max() > 0 for path in before)


@EVERY
def test_masked_examples_are_as_if_they_were_not_there_in_the_backward_pass_too(module):
    x, g = data(0).astype("f4"), cotangent(0).astype("f4")
    g[3] = 0  # a loss does not ask for what is masked
    padded = x.copy()
    padded[3] = np.nan
    mask = np.array([True, True, True, False])
    variables = start(module)
    _, by_x, after = stepper(module, mask)(variables, padded, g)
    _, alone_by_x, alone = stepper(module)(variables, x[:3], g[:3])
    np.testing.assert_allclose(by_x[:3], alone_by_x, atol=1e-5)
    np.testing.assert_array_equal(by_x[3], np.zeros_like(by_x[3]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after, alone)


@EVERY
def test_a_batch_of_nothing_moves_nothing(module):
    step, variables = stepper(module, np.zeros(4, bool)), start(module)
    _, by_x, after = step(variables, data(0).astype("f4"), cotangent(0).astype("f4"))
    assert np.isfinite(by_x).all()
    jax.tree.map(np.testing.assert_array_equal, after, variables)


@EVERY
@pytest.mark.parametrize("where", ["input", "gradient"])
def test_what_is_not_finite_leaves_the_whole_backward_state(module, where):
    """An infinity in x is seen forward; one in the gradient by the output only behind."""
    step, x, g = stepper(module), data(0).astype("f4"), cotangent(0).astype("f4")
    good = step(start(module), x, g)[2]
    bad = {"input": x.copy(), "gradient": g.copy()}
    bad_x, bad_g = (
        bad[where] if where == kind else v for kind, v in (("input", x), ("gradient", g))
    )
    bad[where].flat[5] = np.inf
    kept, before = (split_state(v["batch_stats"])[0] for v in (step(good, bad_x, bad_g)[2], good))
    for path in before:
        np.testing.assert_array_equal(kept[path], before[path])
    after, _ = split_state(step(good, x + 1, g)[2]["batch_stats"])
    assert all(np.abs(after[path] - before[path]).max() > 0 for path in before)
