"""Statistics within an example, mixed with a batch's, and none: by hand and at their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paper_reference import start, stepper

from normlab.models.activations import relu
from normlab.norms import (
    NORMS,
    BatchNorm,
    Derf,
    DynamicTanh,
    EvoNormB0,
    EvoNormS0,
    FilterResponseNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    ProxyNorm,
    SwitchableNorm,
    make_norm,
)

CASES = {
    "filter_response_norm": FilterResponseNorm(),
    "evonorm_s0": EvoNormS0(num_groups=2),
    "evonorm_b0": EvoNormB0(),
    "switchable_norm": SwitchableNorm(),
    "proxy_norm": ProxyNorm(activation=relu),
    "dyt": DynamicTanh(),
    "derf": Derf(),
}


def apply(module, x, params=None, train=True):
    x = jnp.asarray(x, jnp.float32)
    variables = module.init(jax.random.key(0), x, train=True)
    if params is not None:
        params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
        variables = {**variables, "params": {**variables["params"], **params}}
    return module.apply(variables, x, train=train, mutable=["batch_stats"])[0]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1), (1, 4), (3, 4), (1, 2, 2, 1)], ids=str)
def test_few_or_equal_values_give_no_nan_and_a_bounded_output(name, shape):
    """Nothing is blown up by 1/√ε, about 316, where there is one value to a group."""
    module = CASES[name].clone(**({"num_groups": 1} if name == "evonorm_s0" else {}))
    variables, step = start(module, jnp.zeros(shape)), stepper(module)
    several = np.float32(np.random.default_rng(0).normal(size=shape))
    for x in (several, np.full(shape, 3.0, np.float32)):
        found = step(variables, x, np.ones_like(x), None)
        assert x is not several or np.abs(found[0]).max() < 10
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


# By hand -----------------------------------------------------------------------------------------


def test_filter_response_normalization_by_hand():
    # 3 and −4 over two positions: ν² = 12.5, ν = 3.5355; 3/ν = 0.8485, −4/ν = −1.1314, cut at −1.
    y = apply(FilterResponseNorm(), [[[3.0], [-4.0]]], {"tau": [-1.0]})
    np.testing.assert_allclose(y, [[[0.8485281], [-1.0]]], atol=1e-5)


def test_at_one_position_epsilon_is_learned_and_the_step_is_soft():
    x = jnp.asarray([[0.01]])
    # 0.01/√(10⁻⁴ + 10⁻⁶ + 10⁻⁴) = 0.7053; without the learned part 0.01/√(1.01·10⁻⁴) = 0.9950.
    np.testing.assert_allclose(apply(FilterResponseNorm(), x), [[0.7053456]], atol=1e-5)
    fixed = FilterResponseNorm(learn_epsilon="never")
    np.testing.assert_allclose(apply(fixed, x), [[0.9950372]], atol=1e-5)
    params = FilterResponseNorm().init(jax.random.key(0), x, train=True)["params"]
    assert params["extra_epsilon"].shape == ()
    with pytest.raises(ValueError, match="learn_epsilon 'sometimes' is none of never, single"):
        apply(FilterResponseNorm(learn_epsilon="sometimes"), x)


def test_evonorm_s0_by_hand():
    # 1 and 3: variance 1. 1·σ(1) = 0.7311, 3·σ(3) = 2.8577.
    y = apply(EvoNormS0(num_groups=1, epsilon=0.0), [[1.0, 3.0]])
    np.testing.assert_allclose(y, [[0.7310586, 2.8577224]], atol=1e-5)


def test_evonorm_b0_by_hand():
    # One channel of 0, 2 | 4, 6: s²_B = 5, s_I = 1. Denominators max(2.2361, x + 1): 2.24, 3, 5, 7.
    y = apply(EvoNormB0(epsilon=0.0), [[[0.0], [2.0]], [[4.0], [6.0]]])
    np.testing.assert_allclose(y.ravel(), [0, 2 / 3, 4 / 5, 6 / 7], atol=1e-6)


def test_proxy_of_relu_has_its_moments():
    # relu(z): mean 1/√(2π) = 0.3989, variance ½ − 1/(2π) = 0.3408. At x̂ = ±1:
    # (1 − 0.3989)/√0.3708 = 0.987, −0.3989/√0.3708 = −0.655; 200 quantiles come near.
    y = apply(ProxyNorm(activation=relu, epsilon=0.0), [[1.0, 3.0]])
    np.testing.assert_allclose(y, [[-0.655, 0.987]], atol=6e-3)


def test_dynamic_tanh_and_erf_by_hand():
    # α = 0.5: tanh(1) = 0.7616, erf(1) = 0.8427.
    np.testing.assert_allclose(apply(DynamicTanh(), [[2.0]]), [[0.7615942]], atol=1e-6)
    np.testing.assert_allclose(apply(Derf(), [[2.0]]), [[0.8427008]], atol=1e-6)


# Limiting cases, and where they end --------------------------------------------------------------

FEATURES = np.random.default_rng(5).normal(size=(4, 3, 3, 4)) * 2 + np.arange(4)


@pytest.mark.parametrize(
    ("index", "single"), [(0, InstanceNorm()), (1, LayerNorm()), (2, BatchNorm())], ids=str
)
def test_switchable_with_all_weight_on_one_is_that_one(index, single):
    weights = np.full(3, -40.0)
    weights[index] = 40
    one_hot = {"mean_weight": weights, "var_weight": weights}
    np.testing.assert_allclose(
        apply(SwitchableNorm(), FEATURES, one_hot), apply(single, FEATURES), atol=2e-5
    )
    assert np.abs(apply(SwitchableNorm(), FEATURES) - apply(single, FEATURES)).max() > 0.1


def test_switchable_mixes_layer_and_batch_alone_at_one_position():
    x = jnp.asarray(FEATURES[:, 0, 0])
    params = SwitchableNorm().init(jax.random.key(0), x, train=True)["params"]
    assert params["mean_weight"].shape == params["var_weight"].shape == (2,)


def test_evonorm_s0_with_v_zero_is_half_of_x_over_the_groups_deviation():
    still = apply(EvoNormS0(num_groups=2), FEATURES, {"v": np.zeros(4)})
    centered = apply(GroupNorm(num_groups=2), FEATURES)
    # It differs from group normalization by ½ and by the mean that is not subtracted.
    means = np.repeat(FEATURES.reshape(4, 9, 2, 2).mean((1, 3)), 2, -1)
    deviations = np.repeat(FEATURES.reshape(4, 9, 2, 2).std((1, 3)), 2, -1)
    np.testing.assert_allclose(2 * still, centered + (means / deviations)[:, None, None], atol=1e-4)
    assert np.abs(2 * still - centered).max() > 0.1


def test_evonorm_b0_with_v_zero_divides_by_the_larger_deviation():
    x = FEATURES * np.asarray([0.1, 0.1, 0.1, 3])[:, None, None, None]
    y = apply(EvoNormB0(), x, {"v": np.zeros(4)})
    batch, own = x.std((0, 1, 2)), x.std((1, 2), keepdims=True)
    np.testing.assert_allclose(y, x / np.maximum(batch, own), atol=1e-3)
    assert np.abs(y - x / batch).max() > 0.1


def test_proxy_norm_without_an_activation_is_group_normalization():
    bare, group = ProxyNorm(num_groups=2, activation=None), GroupNorm(num_groups=2)
    np.testing.assert_array_equal(apply(bare, FEATURES), apply(group, FEATURES))
    acting = apply(ProxyNorm(num_groups=2, activation=relu), FEATURES)
    assert np.abs(acting - relu(apply(group, FEATURES))).max() > 0.1


def test_dynamic_tanh_of_small_values_is_a_product():
    np.testing.assert_allclose(apply(DynamicTanh(), FEATURES / 1e3), FEATURES / 2e3, atol=1e-6)
    assert np.abs(apply(DynamicTanh(), FEATURES) - FEATURES / 2).max() > 0.1


# Who activates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, cls in NORMS.items() if cls.replaces_activation])
def test_the_factory_hands_over_the_activation_and_none_where_a_model_has_none(name):
    from normlab.config import load_config
    from normlab.run_length import RunLength

    config = load_config(f"configs/digits.py:norm={name}")
    assert "activation" not in config.norm
    factory = make_norm(config, RunLength.of(config))
    both = factory.norm_act(name="a", activation=jnp.tanh)
    assert (type(both), both.activation) == (NORMS[name], jnp.tanh)
    assert factory(name="b").activation is None


@pytest.mark.parametrize("cls", [EvoNormS0, EvoNormB0])
def test_evonorm_without_an_activation_is_the_affine_map(cls):
    params = {"scale": np.arange(4), "bias": np.ones(4)}
    y = apply(
        cls(num_groups=2, activation=None) if cls is EvoNormS0 else cls(activation=None),
        FEATURES,
        params,
    )
    np.testing.assert_allclose(y, FEATURES * np.arange(4) + 1, atol=1e-5)
