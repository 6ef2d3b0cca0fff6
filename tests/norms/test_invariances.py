"""What each normalizer does not see, and what follows for the gradient.

Six changes of a layer's weights and data (Ba, Kiros & Hinton 2016, table 1), for each normalizer
and for each method of weights. A loss that does not see a change has a gradient orthogonal to it,
so each "yes" is tested twice, and each "no" by a case that differs.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normlab.norms import NORMS
from normlab.norms.scaled_weight_standardization import scaled_standardized_weights
from normlab.norms.weight_centering import centered_weights
from normlab.norms.weight_norm import normalized_weights
from normlab.norms.weight_standardization import standardized_weights

EXAMPLES, POSITIONS, INPUTS, UNITS = 6, 3, 5, 4
NEARLY_ZERO = 1e-12
GROUPED = {"num_groups": 2, "epsilon": NEARLY_ZERO}
PLAIN = {"epsilon": NEARLY_ZERO}
CORRECTED = {"r_max": 1e9, "d_max": 1e9, **PLAIN} | dict.fromkeys(
    ("ramp_start_steps", "r_ramp_end_steps", "d_ramp_end_steps"), 0
)

# Each row: rescaling of all weights, of one unit's weights, recentring of the weights (one vector
# added to every unit's), rescaling of the data, recentring of the data (one vector added to every
# case), rescaling of one case. Three positions an example, so statistics over an example are not
# those over a position: recentring adds w·x, another number at each.
TABLE = {
    # The paper's own rows.
    "batch_norm": (PLAIN, "yes yes no yes yes no"),
    "weight_norm": (None, "yes yes no no no no"),
    "layer_norm channel": ({"axes": "channel", **PLAIN}, "yes no yes yes no yes"),
    # Derived for the others.
    "none": ({}, "no no no no no no"),
    "layer_norm": (PLAIN, "yes no no yes no yes"),
    "rms_norm": (PLAIN, "yes no no yes no yes"),
    "rms_norm channel": ({"axes": "channel", **PLAIN}, "yes no no yes no yes"),
    "group_norm": (GROUPED, "yes no no yes no yes"),
    "instance_norm": (PLAIN, "yes yes no yes yes yes"),
    "batch_renorm": (PLAIN, "yes yes no yes yes no"),  # r = 1 and d = 0 at first
    # Fully corrected, it is (x − μ)/σ of the running statistics.
    "batch_renorm corrected": (CORRECTED, "no no no no no no"),
    "l1_batch_norm": (PLAIN, "yes yes no yes yes no"),
    "mean_only_batch_norm": ({}, "no no no no yes no"),
    "batch_group_norm": (GROUPED, "yes no no yes no no"),
    "batch_layer_norm": (PLAIN, "yes no no yes no no"),
    "cross_iteration_batch_norm": (PLAIN, "yes yes no yes yes no"),  # at its first step
    "full_norm": (PLAIN, "yes yes no yes yes no"),  # at its first step
    "moving_average_batch_norm": (PLAIN, "yes yes no yes no no"),  # in its warm-up
    "online_norm": ({"control": "none"}, "no no no no no no"),
    # Group scaling takes out the size of each position, so all that follows is blind to it.
    "power_norm": (PLAIN, "yes no no yes no yes"),
    "power_norm alone": ({"group_scaling": False, **PLAIN}, "yes yes no yes no no"),
    "switchable_norm": (PLAIN, "yes no no yes no no"),
    "filter_response_norm": ({"activation": None, **PLAIN}, "yes yes no yes no yes"),
    "evonorm_b0": (PLAIN, "yes yes no yes no no"),
    "evonorm_s0": (GROUPED, "no no no no no no"),  # σ(vx) sees the size of x
    "evonorm_s0 unactivated": ({**GROUPED, "activation": None}, "no no no no no no"),
    "proxy_norm": (PLAIN, "yes no no yes no yes"),
    # Whitened channels are rotated back to x's axes (ZCA), so a channel's size stays visible.
    "decorrelated_batch_norm": (PLAIN, "yes no no yes yes no"),
    "iterative_norm": (PLAIN, "yes no no yes yes no"),
    "dyt": ({}, "no no no no no no"),
    "derf": ({}, "no no no no no no"),
    "weight_centering": (None, "no no no no no no"),
    "weight_standardization": (None, "yes yes no no no no"),
    "scaled_weight_standardization": (None, "yes yes no no no no"),
}
METHODS = {
    "weight_norm": lambda w: normalized_weights(w, jnp.ones(UNITS)),
    "weight_centering": centered_weights,
    "weight_standardization": lambda w: standardized_weights(w, epsilon=0.0),
    "scaled_weight_standardization": lambda w: scaled_standardized_weights(w, jnp.ones(UNITS)),
}
CHANGES = (
    "weights rescaled",
    "one unit's weights rescaled",
    "weights recentred",
    "data rescaled",
    "data recentred",
    "one case rescaled",
)
OF_GRADIENTS = {
    "batch_renorm corrected": "yes yes no yes yes no",  # none flows through r and d: as batch norm
    "power_norm alone": "no no no no no no",  # the running ν starts at 0: g/ψ
}
"""Where the gradient is the paper's and no derivative of the output."""


def changed(change, w, x):
    """(weights, data) after a change: w [INPUTS, UNITS], x [EXAMPLES, POSITIONS, INPUTS]."""
    vector = jnp.linspace(-1.0, 2.0, INPUTS)
    return {
        "weights rescaled": (2.5 * w, x),
        "one unit's weights rescaled": (w.at[:, 1].multiply(2.5), x),
        "weights recentred": (w + vector[:, None], x),
        "data rescaled": (w, 2.5 * x),
        "data recentred": (w, x + vector),
        "one case rescaled": (w, x.at[2].multiply(2.5)),
    }[change]


def seen(change, w, x, by_w, by_x):
    """The slopes of the loss along a change, zero where it is not seen."""
    return {
        "weights rescaled": jnp.sum(w * by_w),
        "one unit's weights rescaled": jnp.sum(w * by_w, 0),
        "weights recentred": by_w.sum(1),
        "data rescaled": jnp.sum(x * by_x),
        "data recentred": by_x.sum((0, 1)),
        "one case rescaled": jnp.sum(x * by_x, (1, 2)),
    }[change]


def module_of(row):
    cls, fields = NORMS[row.split()[0]], TABLE[row][0]
    return cls(**fields, **({"param_dtype": "float64"} if hasattr(cls, "param_dtype") else {}))


def data():
    random = np.random.default_rng(0)
    x = random.normal(size=(EXAMPLES, POSITIONS, INPUTS)) * random.uniform(0.5, 2, (EXAMPLES, 1, 1))
    return random.normal(size=(INPUTS, UNITS)), x + random.normal(size=INPUTS)


def layer_of(row):
    """The compiled layer of a row, (w, x) -> (y, gradients by w and x of Σ sin y), at its start."""
    method = METHODS.get(row)

    def of_weights(w, x):
        return x @ method(w)

    def normalized(w, x):
        module = module_of(row)
        variables = module.init(jax.random.key(0), x @ w, train=True)
        return module.apply(variables, x @ w, train=True, mutable=["batch_stats"])[0]

    layer = normalized if method is None else of_weights

    @jax.jit
    def run(w, x):
        def loss(w, x):
            y = layer(w, x)
            return jnp.sum(jnp.sin(y + 0.3)), y

        (by_w, by_x), y = jax.grad(loss, (0, 1), has_aux=True)(w, x)
        return y, by_w, by_x

    return run


def test_every_normalizer_has_a_row():
    assert {row.split()[0] for row in TABLE} == set(NORMS) | set(METHODS)


@pytest.mark.parametrize("row", TABLE)
def test_what_a_layer_sees_of_its_weights_and_data(row):
    with jax.enable_x64(True):
        run = layer_of(row)
        w, x = map(jnp.asarray, data())
        y, by_w, by_x = run(w, x)
        answers, slopes = TABLE[row][1], OF_GRADIENTS.get(row, TABLE[row][1])
        for change, same, flat in zip(CHANGES, answers.split(), slopes.split(), strict=True):
            difference = float(jnp.abs(run(*changed(change, w, x))[0] - y).max())
            assert difference < 1e-8 if same == "yes" else difference > 1e-2, change
            slope = float(jnp.abs(seen(change, w, x, by_w, by_x)).max())
            assert slope < 1e-8 if flat == "yes" else slope > 1e-2, change


# Over the values that share a statistic ----------------------------------------------------------
# Each: the axes of [N, P, groups, channels of a group] that share one, whether the gradient by x
# sums to zero over them (the mean is taken out) and whether it is orthogonal to x over them (the
# size is; with a zero sum that is orthogonal to x̂, too).

SETS = {
    "none": ((0, 1), False, False),
    "batch_norm": ((0, 1), True, True),
    "batch_renorm": ((0, 1), True, True),
    "l1_batch_norm": ((0, 1), True, True),
    "mean_only_batch_norm": ((0, 1), True, False),
    "batch_group_norm": ((0, 1, 3), True, True),
    "batch_layer_norm": ((0, 2, 3), True, True),  # of a position
    "cross_iteration_batch_norm": ((0, 1), True, True),  # at its first step
    "full_norm": ((0, 1), True, True),  # at its first step
    "moving_average_batch_norm": ((0, 1), False, True),
    "online_norm": ((0, 1), False, False),
    "power_norm": ((2, 3), False, True),  # of group scaling
    "layer_norm": ((1, 2, 3), True, True),
    "layer_norm channel": ((2, 3), True, True),
    "rms_norm": ((1, 2, 3), False, True),
    "rms_norm channel": ((2, 3), False, True),
    "group_norm": ((1, 3), True, True),
    "instance_norm": ((1,), True, True),
    "switchable_norm": ((0, 1, 2, 3), True, True),
    "filter_response_norm": ((1,), False, True),
    "evonorm_b0": ((0, 1), False, True),
    "evonorm_s0": ((1, 3), False, False),
    "proxy_norm": ((1, 2, 3), True, True),
    "decorrelated_batch_norm": ((0, 1, 2, 3), True, True),
    "iterative_norm": ((0, 1, 2, 3), True, True),
    "dyt": ((0, 1), False, False),
    "derf": ((0, 1), False, False),
}


@functools.cache
def gradient_of(row):
    """(x, the gradient by x of Σ sin(y + 0.3)), both [N, P, groups, channels of a group]."""
    groups = 2 if TABLE[row][0].get("num_groups") else 1
    apart = (EXAMPLES, POSITIONS, groups, UNITS // groups)
    with jax.enable_x64(True):
        random = np.random.default_rng(4)
        shift = random.normal(size=(EXAMPLES, 1, UNITS))
        x = random.normal(size=(EXAMPLES, POSITIONS, UNITS)) + shift
        by_x = np.asarray(layer_of(row)(jnp.eye(UNITS), jnp.asarray(x))[2])
    return x.reshape(apart), by_x.reshape(apart)


@pytest.mark.parametrize("row", SETS)
def test_gradients_over_the_values_that_share_a_statistic(row):
    axes, centered, scaled = SETS[row]
    x, by_x = gradient_of(row)
    sums, along = by_x.sum(axes), (x * by_x).sum(axes)
    assert math.prod(x.shape[axis] for axis in axes) > 1
    for values, zero in ((sums, centered), (along, scaled)):
        largest = np.abs(values).max()
        assert largest < 1e-8 if zero else largest > 1e-2


def test_every_normalizer_has_its_sets():
    assert {row.split()[0] for row in SETS} == set(NORMS)


def test_what_is_left_of_a_gradient_after_batch_normalization():
    """‖∂ℓ/∂x‖² = (γ²/σ²)(‖g‖² − ⟨1, g⟩²/m − ⟨g, x̂⟩²/m), Santurkar et al. 2018, theorem 4.1."""
    with jax.enable_x64(True):
        random = np.random.default_rng(6)
        x, g, gamma = random.normal(size=(7, 1)) * 3 + 1, random.normal(size=(7, 1)), 1.7
        module = NORMS["batch_norm"](epsilon=0.0, param_dtype="float64")
        variables = module.init(jax.random.key(0), jnp.asarray(x), train=True)
        params = {"scale": jnp.full(1, gamma), "bias": jnp.zeros(1)}

        def loss(x):
            v = {**variables, "params": params}
            return jnp.sum(g * module.apply(v, x, train=True, mutable=["batch_stats"])[0])

        found = float(jnp.sum(jax.grad(loss)(jnp.asarray(x)) ** 2))
    standard = (x - x.mean()) / x.std()
    rest = (g**2).sum() - g.sum() ** 2 / 7 - (g * standard).sum() ** 2 / 7
    assert found == pytest.approx(gamma**2 / x.var() * rest, rel=1e-10)
    # And not that of the plain gradient over σ, nor of one projection alone.
    assert found < 0.95 * gamma**2 / x.var() * (g**2).sum()
