"""Where one normalizer is another, or a plain formula, and an input or a setting where it is not.

Groups of channels, axes, ghosts and corrections are in `test_limits.py`, one-hot mixtures and
learned slopes of zero in `test_example_family.py`, what the batch as the data set gives in
`test_backward.py`.
"""

import dataclasses
import math
from collections.abc import Callable

import example_equations
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normlab.norms import (
    BatchLayerNorm,
    BatchNorm,
    BatchRenorm,
    DecorrelatedBatchNorm,
    Derf,
    DynamicTanh,
    EvoNormB0,
    EvoNormS0,
    FilterResponseNorm,
    FullNorm,
    GroupNorm,
    Identity,
    InstanceNorm,
    IterativeNorm,
    LayerNorm,
    MeanOnlyBatchNorm,
    MovingAverageBatchNorm,
    OnlineNorm,
    PowerNorm,
    ProxyNorm,
    RMSNorm,
    SwitchableNorm,
)
from normlab.norms.scaled_weight_standardization import scaled_standardized_weights
from normlab.norms.weight_norm import data_dependent_start, normalized_weights, weight_norms
from normlab.norms.weight_standardization import standardized_weights

NOW = dict.fromkeys(("ramp_start_steps", "r_ramp_end_steps", "d_ramp_end_steps"), 0)


def of(module, train=True, state=None, **params):
    """The function of x that a module is at its start, with some parameters or state in place."""

    def apply(x):
        variables = module.init(jax.random.key(0), x, train=True)
        stats = {**variables.get("batch_stats", {}), **(state or {})}
        params_in = {
            name: jnp.full_like(value, params.get(name, value[..., 0] if value.ndim else value))
            for name, value in variables.get("params", {}).items()
        }
        both = {"params": params_in, "batch_stats": stats}
        return module.apply(both, x, train=train, mutable=["batch_stats"])[0]

    return apply


def second_step(module, first):
    """A module's training output after it has seen another batch."""

    def apply(x):
        variables = module.init(jax.random.key(0), x, train=True)
        _, after = module.apply(variables, first, train=True, mutable=["batch_stats"])
        return module.apply({**variables, **after}, x, train=True, mutable=["batch_stats"])[0]

    return apply


def batch(*shape, seed=0):
    """Examples and channels with means and spreads of their own."""
    random = np.random.default_rng(seed)
    spread = random.uniform(0.5, 2, (shape[0], *[1] * (len(shape) - 2), shape[-1]))
    return random.normal(size=shape) * spread + random.normal(size=spread.shape)


def uncorrelated(rows, channels):
    """Columns that are orthogonal to each other and to a constant, of spreads of their own."""
    columns, _ = np.linalg.qr(np.column_stack([np.ones(rows), batch(rows, channels, seed=1)]))
    return columns[:, 1:] * math.sqrt(rows) * np.arange(1, channels + 1) + 3


def moments_of(x):
    axes = tuple(range(x.ndim - 1))
    return {"mean": jnp.asarray(x.mean(axes)), "sigma": jnp.asarray(np.sqrt(x.var(axes) + 1e-5))}


def centered(x, axis):
    return x - x.mean(axis, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Row:
    """`left` and `right` agree at `here` and not at `there`, or not if `unlike` is on the left."""

    left: Callable
    right: Callable
    here: np.ndarray
    there: np.ndarray | None = None
    unlike: Callable | None = None
    gradients: bool = True  # they agree in gradient, too


X, Y, ONE, KERNEL = batch(4, 6, 4), batch(4, 6, 4, seed=1), batch(1, 6, 4), batch(3, 3, 2, 5)
UNIT = (X - X.mean((0, 1))) / X.std((0, 1)) + np.arange(4)
BARE = {"use_scale": False, "use_bias": False}
ROWS = {
    "instance is batch normalization of one example": Row(
        of(InstanceNorm()), of(BatchNorm()), ONE, there=X
    ),
    "one group is layer normalization of the channels at one position": Row(
        of(GroupNorm(num_groups=1)), of(LayerNorm(axes="channel")), batch(5, 8), there=X
    ),
    "renorm is batch norm where its state is the batch's": Row(
        of(BatchRenorm(**NOW), state=moments_of(X)), of(BatchNorm()), X, there=Y
    ),
    "renorm without limits trains as it evaluates": Row(
        of(BatchRenorm(**NOW, r_max=1e9, d_max=1e9), state=moments_of(Y)),
        of(BatchRenorm(), train=False, state=moments_of(Y)),
        X,
        unlike=of(BatchRenorm(**NOW, r_max=1.1, d_max=0.1), state=moments_of(Y)),
        gradients=False,
    ),
    "mean-only is batch norm where the deviation is 1": Row(
        of(MeanOnlyBatchNorm()), of(BatchNorm(epsilon=0.0)), UNIT, there=2 * UNIT, gradients=False
    ),
    "full norm without memory is batch norm at every step": Row(
        second_step(FullNorm(momentum=0.0), Y),
        of(BatchNorm()),
        X,
        unlike=second_step(FullNorm(momentum=0.5), Y),
    ),
    "filter response of centered maps is instance norm": Row(
        of(FilterResponseNorm(activation=None)),
        of(InstanceNorm(epsilon=1e-6)),
        centered(X, 1),
        there=X,
        gradients=False,
    ),
    "filter response of one channel is rms norm": Row(
        of(FilterResponseNorm(activation=None)), of(RMSNorm(epsilon=1e-6)), X[..., :1], there=X
    ),
    "filter response is moving average batch norm of one example in its warm-up": Row(
        of(FilterResponseNorm(activation=None, epsilon=1e-5)),
        of(MovingAverageBatchNorm()),
        ONE,
        there=X,
    ),
    "filter response with its activation is the threshold of it": Row(
        of(FilterResponseNorm()),
        lambda x: jnp.maximum(of(FilterResponseNorm(activation=None))(x), 0),
        X,
        unlike=of(FilterResponseNorm(), tau=-1.0),
    ),
    "power norm in its warm-up is moving average batch norm in its own": Row(
        of(PowerNorm(group_scaling=False)),
        of(MovingAverageBatchNorm()),
        X,
        unlike=of(PowerNorm()),
        gradients=False,
    ),
    "power norm at its start after the warm-up is the identity": Row(
        of(PowerNorm(group_scaling=False, warmup_steps=0, epsilon=0.0)),
        of(Identity()),
        X,
        unlike=of(PowerNorm(group_scaling=False, warmup_steps=1)),
    ),
    "online norm of streams that stand is the identity": Row(
        of(OnlineNorm(momentum=1.0, backward_momentum=1.0, control="none", epsilon=0.0)),
        of(Identity()),
        X,
        unlike=of(OnlineNorm(momentum=0.9, backward_momentum=1.0, control="none")),
    ),
    "online norm without memory is instance norm of repeated examples": Row(
        lambda x: of(OnlineNorm(momentum=0.0, control="none"))(x)[1:],
        lambda x: of(InstanceNorm())(x)[1:],
        np.repeat(ONE, 4, 0),
        there=X,
        gradients=False,
    ),
    # 1/m = δ = 10⁻⁴ leaves the batch's part alone, 1 − 2δ of it, over √d.
    "batch layer norm of ten thousand examples is batch norm": Row(
        of(BatchLayerNorm()),
        lambda x: (1 - 2e-4) / math.sqrt(2) * of(BatchNorm(epsilon=1e-3))(x),
        batch(10_000, 2),
        there=batch(3, 2),
    ),
    "whitening of uncorrelated channels is batch norm": Row(
        of(DecorrelatedBatchNorm()),
        of(BatchNorm()),
        uncorrelated(24, 4),
        there=batch(24, 4),
        gradients=False,  # that of the root sees how a correlation would grow
    ),
    "iterative norm without iterations divides by the root of the whole variance": Row(
        of(IterativeNorm(num_iterations=0, epsilon=0.0)),
        lambda x: (x - x.mean((0, 1))) / jnp.sqrt(x.var((0, 1)).sum()),
        X,
        unlike=of(IterativeNorm()),
    ),
    "evonorm b0 without v divides one example by its deviation": Row(
        of(EvoNormB0(), v=0.0),
        lambda x: x / jnp.sqrt(x.var(1, keepdims=True) + 1e-5),
        ONE,
        there=X,
    ),
    "evonorm s0 of a steep v is relu over the deviation": Row(
        of(EvoNormS0(num_groups=1), v=1e6),
        lambda x: jax.nn.relu(x) / jnp.sqrt(x.var((1, 2), keepdims=True) + 1e-5),
        X,
        unlike=of(EvoNormS0(num_groups=1), v=1.0),
    ),
    # The proxy of the identity is the Gaussian itself: mean 0, and the variance of its quantiles.
    "proxy norm of the identity is layer norm, a little smaller": Row(
        of(ProxyNorm(activation=lambda x: x)),
        lambda x: (
            of(LayerNorm())(x)
            / math.sqrt(float(example_equations.gaussian_quantiles().var()) + 0.03)
        ),
        X,
        unlike=of(ProxyNorm(activation=jax.nn.relu)),
    ),
    "switchable norm of one example cannot tell instance from batch": Row(
        of(SwitchableNorm()),
        lambda x: _two_to_one(x),
        ONE,
        there=X,
    ),
    "derf of small values is a product": Row(
        of(Derf()), lambda x: x / math.sqrt(math.pi), 1e-4 * X, there=X
    ),
    "dynamic tanh of a steep slope is the sign": Row(
        of(DynamicTanh(initial_alpha=1e6)), jnp.sign, X, unlike=of(DynamicTanh())
    ),
    "batch norm at its start evaluates as the identity": Row(
        of(BatchNorm(epsilon=0.0), train=False),
        of(Identity()),
        X,
        unlike=of(BatchNorm(), train=False, state={"mean": jnp.ones(4)}),
    ),
    "weight norm of the norm is the kernel": Row(
        lambda v: normalized_weights(v, jax.lax.stop_gradient(weight_norms(v))),
        lambda v: v,
        KERNEL,
        unlike=lambda v: normalized_weights(v, jnp.ones(5)),
        gradients=False,
    ),
    "scaled weight standardization is weight standardization over the root of the fan-in": Row(
        lambda w: scaled_standardized_weights(w, jnp.ones(5), 0.0),
        lambda w: standardized_weights(w, epsilon=0.0) / math.sqrt(18),
        KERNEL,
        unlike=lambda w: standardized_weights(w, epsilon=0.0),
    ),
    "scaled weight standardization of centered kernels is weight norm": Row(
        lambda w: scaled_standardized_weights(w, jnp.arange(1.0, 6)),
        lambda w: normalized_weights(w, jnp.arange(1.0, 6)),
        centered(KERNEL, (0, 1, 2)),
        there=KERNEL,
        gradients=False,
    ),
    "weight norm started from data is batch norm of the first batch": Row(
        lambda y: data_dependent_start(y, jnp.ones(4), jnp.zeros(4))[2],
        of(BatchNorm(epsilon=0.0)),
        X,
        unlike=lambda y: data_dependent_start(y, jnp.ones(4), None)[2],
    ),
}


def _two_to_one(x):
    """A third of layer and two thirds of instance statistics."""
    own, whole = (1,), (1, 2)
    mean = (2 * x.mean(own, keepdims=True) + x.mean(whole, keepdims=True)) / 3
    var = (2 * x.var(own, keepdims=True) + x.var(whole, keepdims=True)) / 3
    return (x - mean) / jnp.sqrt(var + 1e-5)


def compiled(*functions):
    """The functions' values and the gradients of Σ sin y by x, compiled together."""

    @jax.jit
    def run(x):
        def one(function):
            def loss(x):
                y = function(x)
                return jnp.sum(jnp.sin(y + 0.3)), y

            gradient, y = jax.grad(loss, has_aux=True)(x)
            return y, gradient

        return [one(function) for function in functions]

    return run


@pytest.mark.parametrize("name", ROWS)
def test_one_is_the_other_here_and_not_there(name):
    row = ROWS[name]
    with jax.enable_x64(True):
        unlike = [] if row.unlike is None else [row.unlike]
        run = compiled(row.left, row.right, *unlike)
        (y, by_x), (expected, by_x_expected), *others = run(jnp.asarray(row.here))
        np.testing.assert_allclose(y, expected, atol=1e-6)
        same = np.allclose(by_x, by_x_expected, atol=1e-6)
        assert same == row.gradients  # where they do not agree, the identity ends with the value
        if row.there is not None:
            (y, _), (expected, _) = run(jnp.asarray(row.there))[:2]
        else:
            y = others[0][0]
        assert float(jnp.abs(y - expected).max()) > 0.05
