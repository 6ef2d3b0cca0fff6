"""Cross-iteration batch normalization: statistics of past batches under the weights of now."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from normlab.models.conv import StandardConv, linear_norm
from normlab.models.weight_space import WeightStandardization
from normlab.norms import BatchNorm, CrossIterationBatchNorm

PLAIN = {"use_scale": False, "use_bias": False}


class DenseNorm(nn.Module):
    """A linear layer of three units and the normalizer, which is handed the layer or not."""

    norm: Callable[..., nn.Module]
    handed: bool = True

    @nn.compact
    def __call__(self, x):
        layer = StandardConv().dense(3, use_bias=True, name="layer")
        norm = self.norm(name="norm")
        if self.handed:
            return linear_norm(layer, norm, x, train=True)
        return norm(layer(x), train=True)


def batches(count, seed=0):
    keys = jax.random.split(jax.random.key(seed), count)
    return [jax.random.normal(key, (8, 5)) + jnp.arange(5.0) for key in keys]


def run(net, inputs, kernels, bias=0.5):
    """Returns the output of the last of several steps, each with its own kernel, and the state."""
    variables = net.init(jax.random.key(0), inputs[0])
    stats = variables["batch_stats"]
    for x, kernel in zip(inputs, kernels, strict=True):
        params = {"layer": {"kernel": kernel, "bias": jnp.full(3, bias)}}
        both = {"params": params, "batch_stats": stats}
        y, updated = net.apply(both, x, mutable=["batch_stats"])
        stats = updated["batch_stats"]
    return y, stats["norm"]


def kernels(count, step=0.0):
    first = jax.random.normal(jax.random.key(9), (5, 3))
    change = jax.random.normal(jax.random.key(10), (5, 3))
    return [first + i * step * change for i in range(count)]


def cross(window=3, **fields):
    return partial(CrossIterationBatchNorm, window=window, **PLAIN, **fields)


def test_with_weights_at_rest_it_is_batch_normalization_of_all_batches_of_the_window():
    inputs, weights = batches(4), kernels(4)
    y, _ = run(DenseNorm(cross()), inputs, weights)
    together = jnp.concatenate(inputs[1:]) @ weights[0]
    expected = (together - together.mean(0)) / jnp.sqrt(together.var(0) + 1e-5)
    np.testing.assert_allclose(y, expected[-8:], atol=1e-5)
    # And of nothing less: the first of the four has left the window, the other three count.
    last = inputs[-1] @ weights[0]
    assert not np.allclose(y, (last - last.mean(0)) / last.std(0), atol=1e-2)


def test_past_means_are_brought_up_to_the_weights_of_now_exactly():
    """E[xW + b] is linear in W, so its first-order expansion is no approximation."""
    inputs, weights = batches(3), kernels(3, step=0.7)
    _, state = run(DenseNorm(cross(momentum=0.0)), inputs, weights)
    now = np.concatenate([np.asarray(x) @ np.asarray(weights[-1]) + 0.5 for x in inputs])
    np.testing.assert_allclose(state["mean"], now.mean(0), rtol=1e-5)
    _, state = run(DenseNorm(cross(momentum=0.0), handed=False), inputs, weights)
    then = [np.asarray(x) @ np.asarray(w) + 0.5 for x, w in zip(inputs, weights, strict=True)]
    np.testing.assert_allclose(state["mean"], np.concatenate(then).mean(0), rtol=1e-5)
    assert not np.allclose(state["mean"], now.mean(0), rtol=1e-2)


def test_past_variances_follow_the_papers_first_order_expansion():
    """In float64, from ν = E[x²] and μ as the paper has them."""
    inputs, weights = batches(3), kernels(3, step=0.3)
    _, state = run(DenseNorm(cross(momentum=0.0)), inputs, weights)
    now = np.asarray(weights[-1], np.float64)
    means, squares = [], []
    for x, w in zip(inputs, weights, strict=True):
        x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
        y = x @ w + 0.5
        # ∂μ_c/∂W_ic = E[x_i] and ∂ν_c/∂W_ic = 2 E[y_c x_i].
        means.append(y.mean(0) + ((now - w) * x.mean(0)[:, None]).sum(0))
        square = (y**2).mean(0) + ((now - w) * 2 * (x.T @ y) / len(x)).sum(0)
        squares.append(np.maximum(square, means[-1] ** 2))
    expected = np.mean(squares, 0) - np.mean(means, 0) ** 2
    np.testing.assert_allclose(state["var"], expected, rtol=1e-4)


def test_a_variance_is_compensated_to_first_order_only():
    """The error falls with the square of the change: a tenth of it gives a hundredth."""
    inputs = batches(2)

    def error(step):
        weights = kernels(2, step=step)
        _, state = run(DenseNorm(cross(window=2, momentum=0.0)), inputs, weights)
        now = jnp.concatenate(inputs) @ weights[-1]
        return np.abs(state["var"] - now.var(0)).max()

    assert error(0.01) == pytest.approx(error(0.1) / 100, rel=0.2)
    assert error(1.0) > 0.1


def test_no_gradient_reaches_what_is_past():
    """The loss depends on the kernel by the batch at hand: its statistics have weight 1/2."""
    inputs, weights = batches(2), kernels(2)
    net = DenseNorm(cross(window=2))
    variables = net.init(jax.random.key(0), inputs[0])
    params = {"layer": {"kernel": weights[0], "bias": jnp.zeros(3)}}
    _, after = net.apply({**variables, "params": params}, inputs[0], mutable=["batch_stats"])
    target = jax.random.normal(jax.random.key(3), (8, 3))

    def loss(kernel):
        moved = {"layer": {"kernel": kernel, "bias": jnp.zeros(3)}}
        y, _ = net.apply({**after, "params": moved}, inputs[1], mutable=["batch_stats"])
        return jnp.sum(y * target)

    past = inputs[0] @ weights[0]

    def by_hand(kernel):
        y = inputs[1] @ kernel
        mean = (past.mean(0) + y.mean(0)) / 2
        spread = ((past.mean(0) - mean) ** 2 + (y.mean(0) - mean) ** 2) / 2
        var = (past.var(0) + y.var(0)) / 2 + spread
        return jnp.sum((y - mean) / jnp.sqrt(var + 1e-5) * target)

    expected = jax.grad(by_hand)(weights[0])
    np.testing.assert_allclose(jax.grad(loss)(weights[0]), expected, atol=1e-4)


def test_padding_of_nan_touches_nothing_that_is_remembered():
    """Six examples and two of padding, masked: as if the six were alone."""

    class Padded(DenseNorm):
        @nn.compact
        def __call__(self, x, mask=None):
            layer = StandardConv().dense(3, use_bias=True, name="layer")
            return linear_norm(layer, self.norm(name="norm"), x, train=True, mask=mask)

    net, [x] = Padded(cross()), batches(1)
    variables = net.init(jax.random.key(0), x)
    padded = x.at[6:].set(jnp.nan)
    _, found = net.apply(variables, padded, jnp.arange(8) < 6, mutable=["batch_stats"])
    _, alone = net.apply(variables, x[:6], mutable=["batch_stats"])
    for name, value in alone["batch_stats"]["norm"].items():
        np.testing.assert_allclose(found["batch_stats"]["norm"][name], value, atol=1e-6)
        assert bool(jnp.isfinite(value).all())


def test_burn_in_is_plain_batch_normalization_and_remembers():
    inputs, weights = batches(3), kernels(3, step=0.2)
    burning, _ = run(DenseNorm(cross(burn_in_steps=3)), inputs, weights)
    plain, _ = run(DenseNorm(partial(BatchNorm, **PLAIN)), inputs, weights)
    np.testing.assert_allclose(burning, plain, atol=1e-5)
    after, _ = run(DenseNorm(cross(burn_in_steps=2)), inputs, weights)
    free, _ = run(DenseNorm(cross()), inputs, weights)
    np.testing.assert_allclose(after, free, atol=1e-6)
    assert not np.allclose(after, plain, atol=1e-2)


def test_a_window_of_one_batch_is_batch_normalization():
    inputs, weights = batches(3), kernels(3, step=0.2)
    one, _ = run(DenseNorm(cross(window=1)), inputs, weights)
    plain, _ = run(DenseNorm(partial(BatchNorm, **PLAIN)), inputs, weights)
    np.testing.assert_allclose(one, plain, atol=1e-6)
    with pytest.raises(ValueError, match="window 0 is not 1 or more"):
        run(DenseNorm(cross(window=0)), inputs, weights)


@pytest.mark.parametrize("conv", [StandardConv(), WeightStandardization()], ids=["plain", "ws"])
def test_what_is_remembered_of_a_convolution_are_derivatives_by_its_kernel(conv):
    class ConvNorm(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = conv.conv(4, 3, strides=2, name="layer")
            norm = CrossIterationBatchNorm(window=2, name="norm")
            return linear_norm(layer, norm, x, train=True), layer(x)

    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3)) + 1
    net = ConvNorm()
    variables = net.init(jax.random.key(1), x)
    _, after = net.apply(variables, x, mutable=["batch_stats"])

    def statistics(kernel):
        params = {**variables["params"], "layer": {"kernel": kernel}}
        (_, y), _ = net.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return y.mean((0, 1, 2)), y.var((0, 1, 2))

    kernel = variables["params"]["layer"]["kernel"]
    by_mean, by_var = jax.jacrev(statistics)(kernel)
    state = after["batch_stats"]["norm"]
    # A unit's statistics depend on its own weights alone: the diagonal of [C, ..., C].
    for found, jacobian in (("mean", by_mean), ("var", by_var)):
        diagonal = jnp.einsum("chwic->hwic", jacobian)
        np.testing.assert_allclose(state[f"window_{found}_slope"][0], diagonal, atol=1e-5)
    np.testing.assert_array_equal(state["window_kernel"][0], kernel)
