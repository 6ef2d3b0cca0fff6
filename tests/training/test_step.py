"""One training step: its arithmetic, its guard, its averages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from normlab.config import load_config
from normlab.models.activations import relu
from normlab.norms import NORMS, split_state
from normlab.training.parallel import Compiler
from normlab.training.setup import build_parts
from normlab.training.state import CULPRITS, create_state
from normlab.training.step import Batch, cross_entropy, make_loss, make_train_step, warmed_up

FIELDS = {"model.widths": (8,), "optim.schedule": "constant", "train.num_steps": 100}


def parts_of(norm="batch_norm", **fields):
    names = {name.replace("__", "."): value for name, value in fields.items()}
    return build_parts(load_config(f"configs/digits.py:model=mlp,norm={norm}", FIELDS | names))


def batch(seed=0):
    images = jax.random.normal(jax.random.key(seed), (64, 8, 8, 1))
    return images, jnp.arange(64) % 10


def stepper(parts, **options):
    return jax.jit(make_train_step(parts.model, parts.direction, parts.schedule, **options))


def same(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_cross_entropy_by_hand():
    # Two equal logits: log 2 whatever the target. Logits (0, log 3): −log(3/4), −log(1/4).
    logits = jnp.array([[0.0, 0.0], [0.0, np.log(3)], [0.0, np.log(3)]])
    got = cross_entropy(logits, jnp.array([0, 1, 0]))
    np.testing.assert_allclose(got, [np.log(2), np.log(4 / 3), np.log(4)], rtol=1e-6)


def test_label_smoothing_by_hand():
    # Smoothing 0.2 over 2 classes: target (0.9, 0.1): 0.9·log(4/3) + 0.1·log 4 for the right class.
    got = cross_entropy(jnp.array([[np.log(3), 0.0]]), jnp.array([0]), 0.2)
    assert float(got[0]) == pytest.approx(0.9 * np.log(4 / 3) + 0.1 * np.log(4), rel=1e-5)


def test_soft_targets_by_hand():
    # Target (0.3, 0.7), logits (0, log 3): 0.3·log 4 + 0.7·log(4/3). Smoothed by 0.2 over two
    # classes: 0.8·(0.3, 0.7) + 0.1 = (0.34, 0.66).
    logits, target = jnp.array([[0.0, np.log(3)]]), jnp.array([[0.3, 0.7]])
    plain = 0.3 * np.log(4) + 0.7 * np.log(4 / 3)
    assert float(cross_entropy(logits, target)[0]) == pytest.approx(plain, rel=1e-6)
    smoothed = 0.34 * np.log(4) + 0.66 * np.log(4 / 3)
    assert float(cross_entropy(logits, target, 0.2)[0]) == pytest.approx(smoothed, rel=1e-6)
    # One class for certain is a label.
    both = [
        cross_entropy(logits, target, 0.2) for target in (jnp.array([1]), jnp.array([[0, 1.0]]))
    ]
    np.testing.assert_array_equal(*both)


def test_of_mixed_examples_the_likeliest_class_is_the_right_one():
    class Logits(nn.Module):
        """The images are the logits."""

        @nn.compact
        def __call__(self, x, *, train, mask=None):
            return self.param("w", nn.initializers.ones, ()) * x

    logits = jnp.array([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 2.0, 1.0]])
    targets = jnp.array([[0.6, 0.4, 0.0], [0.6, 0.0, 0.4], [0.0, 1.0, 0.0]])
    _, (correct, *_) = make_loss(Logits())({"w": jnp.ones(())}, {}, (logits, targets))
    assert int(correct) == 2


# Dropout


class Dropping(nn.Module):
    """A dense layer behind half of the pixels."""

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        if train and self.has_rng("dropout"):
            x = 2 * x * jax.random.bernoulli(self.make_rng("dropout"), shape=x.shape)
        return nn.Dense(10, name="head")(x.reshape(len(x), -1))


def dropping():
    """The step and the state of a run with such a model."""
    parts = parts_of("none")
    state = create_state(parts, Compiler())
    params = Dropping().init(jax.random.key(0), batch()[0], train=False)["params"]
    state = state.replace(params=params, opt_state=parts.direction.init(params))
    return stepper(dataclasses.replace(parts, model=Dropping())), state


def test_a_model_drops_by_the_batchs_key_and_by_nothing_else():
    step, state = dropping()
    images, labels = batch()
    whole = step(state, (images, labels))
    one, again, other = (
        step(state, Batch(images, labels, jax.random.key(key))) for key in (1, 1, 2)
    )
    assert same(one.params, again.params)
    assert not same(one.params, other.params)
    assert not same(one.params, whole.params)


def test_a_key_that_no_model_asks_for_changes_no_bit():
    parts = parts_of()
    step, state = stepper(parts), create_state(parts, Compiler())
    images, labels = batch()
    plain = step(state, (images, labels))
    keyed = step(state, Batch(images, labels, jax.random.key(1)))
    assert same(plain, keyed)


# The step


def test_a_step_is_minus_rate_times_direction():
    parts = parts_of("none", optim__momentum=0.0, optim__base_lr=0.5)
    state = create_state(parts, Compiler())
    images, labels = batch()

    def loss(params):
        logits = parts.model.apply({"params": params}, images, train=True)
        return jnp.mean(cross_entropy(logits, labels))

    gradient = jax.grad(loss)(state.params)
    after = stepper(parts)(state, (images, labels))
    expected = state.params["head"]["kernel"] - 0.5 * gradient["head"]["kernel"]
    np.testing.assert_allclose(after.params["head"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    assert int(after.step) == 1
    assert float(after.totals.loss) == pytest.approx(float(loss(state.params)), rel=1e-5)


@pytest.mark.parametrize("norm", ["none", "batch_norm", "batch_renorm", "layer_norm"])
def test_a_batch_with_nan_changes_no_parameter_and_no_statistic(norm):
    parts = parts_of(norm, train__ema_decay=0.9)
    step = stepper(parts, ema_decay=0.9)
    state = step(create_state(parts, Compiler()), batch())
    images, labels = batch(1)
    after = step(state, (images.at[3].set(jnp.nan), labels))
    for name in ("params", "batch_stats", "opt_state", "ema"):
        assert same(getattr(after, name), getattr(state, name)), name
    assert (int(after.totals.nonfinite), int(after.totals.steps)) == (1, 1)
    assert (int(after.health.streak), CULPRITS[int(after.health.culprit)]) == (1, "loss")
    # The next good batch is learned from, and ends the streak.
    healed = step(after, batch(2))
    assert not same(healed.params, state.params)
    assert int(healed.health.streak) == 0


def test_the_run_is_diverged_after_k_such_steps_in_a_row_and_stands_still():
    parts = parts_of("layer_norm")
    step = stepper(parts, max_nonfinite=3)
    images, labels = batch()
    bad = (images.at[0].set(jnp.inf), labels)
    state = step(create_state(parts, Compiler()), batch())
    for expected in (False, False, True):
        state = step(state, bad)
        assert bool(state.health.diverged) is expected
    assert int(state.health.first_step) == 2  # step 1 was good
    after = step(state, batch(1))
    assert bool(after.health.diverged)
    assert same(after.params, state.params)
    # 1 good step and 3 bad ones were taken; what came after diverging is no step.
    assert (int(after.step), int(after.totals.nonfinite)) == (4, 3)


NO_SQUARES = {"none", "dyt", "derf", "l1_batch_norm", "mean_only_batch_norm"}


@pytest.mark.parametrize(
    ("norm", "model"),
    [
        pytest.param(norm, model, marks=[pytest.mark.slow] if model == "mlp" else [])
        for norm in sorted(set(NORMS) - NO_SQUARES)
        for model in ("mlp", "cnn")
        # Over one value per channel the deviation is 0 whatever the value: nothing overflows.
        if model == "cnn" or norm not in ("instance_norm", "group_norm", "evonorm_s0")
    ],
)
def test_an_overflowing_statistic_is_found_even_where_loss_and_gradient_are_finite(norm, model):
    """1e20² is more than float32 holds: the variance is infinite, and x̂ = x/∞ = 0 is not."""
    strides = {"model.strides": (2,)} if model == "cnn" else {}
    source = f"configs/digits.py:model={model},norm={norm}"
    parts = build_parts(load_config(source, FIELDS | strides))
    step = stepper(parts)
    state = step(create_state(parts, Compiler()), batch())
    images, labels = batch(1)
    after = step(state, (1e20 * images, labels))
    # Some of them make NaN of it, so that the loss is the first to tell; what normalizes by running
    # statistics hands it on, to the gradient of the layer before.
    first = {"statistic", "loss"} | (
        {"gradient"} if norm in ("full_norm", "online_norm") else set()
    )
    assert CULPRITS[int(after.health.culprit)] in first
    assert int(after.totals.nonfinite) == 1
    assert same(after.params, state.params)
    assert same(after.batch_stats, state.batch_stats)


@pytest.mark.parametrize(
    "norm", ["full_norm", "moving_average_batch_norm", "online_norm", "power_norm"]
)
def test_statistics_of_the_backward_pass_move_with_the_step_and_with_nothing_else(norm):
    parts = parts_of(norm)
    step, state = stepper(parts), create_state(parts, Compiler())
    before, _ = split_state(state.batch_stats)
    assert before
    after = step(state, batch())
    moved, _ = split_state(after.batch_stats)
    assert not same(moved, before)
    assert int(after.totals.nonfinite) == 0
    images, labels = batch(1)
    kept = step(after, (images.at[3].set(jnp.inf), labels))
    assert same(kept.batch_stats, after.batch_stats)


def test_a_gradient_that_is_not_finite_keeps_the_statistics_of_the_backward_pass():
    """The loss and all that is seen forward are finite: only the head's gradient is not."""
    parts = parts_of("full_norm")
    step = stepper(parts)
    state = step(create_state(parts, Compiler()), batch())
    head = jax.tree.map(lambda w: w * 1e38, state.params["head"])
    after = step(state.replace(params={**state.params, "head": head}), batch(1))
    assert int(after.totals.nonfinite) == 1
    assert same(after.batch_stats, state.batch_stats)


def test_relu_keeps_nan():
    """XLA's maximum on a CPU may not, and the loss of a broken network would be finite."""
    x = jnp.asarray([jnp.nan, -1.0, 0.0, 2.0])
    y, gradient = jax.jit(jax.value_and_grad(lambda x: relu(x)[1:].sum()))(x)
    assert float(y) == 2.0
    np.testing.assert_array_equal(gradient, [0, 0, 0, 1])
    assert bool(jnp.isnan(jax.jit(lambda x: relu(2 * x).sum())(x)))


def test_two_short_streaks_are_not_a_long_one():
    parts = parts_of("layer_norm")
    step = stepper(parts, max_nonfinite=3)
    images, labels = batch()
    bad = (images.at[0].set(jnp.inf), labels)
    state = create_state(parts, Compiler())
    for item in (bad, bad, batch(), bad, bad):
        state = step(state, item)
    assert not bool(state.health.diverged)
    assert int(state.totals.nonfinite) == 4


def test_the_moving_average_takes_weights_and_statistics_but_no_counter():
    parts = parts_of("batch_renorm", train__ema_decay=0.75)
    before = create_state(parts, Compiler())
    after = stepper(parts, ema_decay=0.75)(before, batch())

    def pick(tree):
        return tree["params"]["head"]["kernel"], tree["batch_stats"]["norm1"]["mean"]

    old = pick({"params": before.params, "batch_stats": before.batch_stats})
    new = pick({"params": after.params, "batch_stats": after.batch_stats})
    for average, x, y in zip(pick(after.ema), old, new, strict=True):
        np.testing.assert_allclose(average, 0.75 * x + 0.25 * y, rtol=1e-5, atol=1e-7)
    assert int(after.ema["batch_stats"]["norm1"]["step"]) == 1
    assert after.ema["batch_stats"]["norm1"]["step"].dtype == jnp.int32


def test_the_averages_decay_grows_to_what_it_is():
    # (1 + t)/(10 + t): 1/10, 2/11, 3/12, and 0.9999 at t = 89,990; below 0.99999 until 899,990.
    got = [float(warmed_up(0.99999, t)) for t in (0, 1, 2, 89_990, 899_991)]
    np.testing.assert_allclose(got, [0.1, 2 / 11, 0.25, 0.9999, 0.99999], rtol=1e-6)
    assert float(warmed_up(0.2, 2)) == pytest.approx(0.2)


def test_a_warmed_up_average_by_hand():
    parts = parts_of("none", train__ema_decay=0.5, train__ema_warmup=True)
    step = stepper(parts, ema_decay=0.5, ema_warmup=True)
    states = [create_state(parts, Compiler())]
    for number in range(3):
        states.append(step(states[-1], batch(number)))
    w0, w1, w2, w3 = (np.asarray(state.params["head"]["kernel"]) for state in states)
    first = 0.1 * w0 + 0.9 * w1
    second = 2 / 11 * first + 9 / 11 * w2
    third = 0.25 * second + 0.75 * w3
    for state, expected in zip(states[1:], (first, second, third), strict=True):
        got = state.ema["params"]["head"]["kernel"]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_the_limits_of_renormalization_move_from_step_to_step_of_one_trace():
    """In the training step too: its losses leave batch normalization's once the ramp begins."""
    fields = {"norm__ramp_start_steps": 2, "norm__r_ramp_end_steps": 4, "norm__d_ramp_end_steps": 4}
    traces, losses = [], {}
    for norm in ("batch_norm", "batch_renorm"):
        parts = parts_of(norm, **(fields if norm == "batch_renorm" else {}))
        train_step = make_train_step(parts.model, parts.direction, parts.schedule)

        @jax.jit
        def step(state, batch, train_step=train_step):
            traces.append(1)
            return train_step(state, batch)

        state, sums = create_state(parts, Compiler()), [0.0]
        for number in range(5):
            state = step(state, batch(number))
            sums.append(float(state.totals.loss))
        losses[norm] = np.diff(sums)
    assert len(traces) == 2  # one a normalizer
    apart = np.abs(losses["batch_norm"] - losses["batch_renorm"])
    # Updates 1 to 3 see the limits after 0, 1 and 2 updates: r = 1, d = 0.
    np.testing.assert_allclose(apart[:3], 0, atol=1e-4)
    assert apart[3:].min() > 1e-3
