"""The deep MLP: its parameters, and what its initializers do to a signal's size with depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normlab.config import load_config
from normlab.errors import UserError
from normlab.models import build, count_params
from normlab.training.setup import build_parts


def model_of(norm="none", **fields):
    source = f"configs/digits.py:model=deep_mlp,norm={norm}"
    return build(load_config(source, {f"model.{name}": value for name, value in fields.items()}))


def started(net, seed=0, images=64):
    x = jax.random.normal(jax.random.key(100 + seed), (images, 8, 8, 1))
    return net.init(jax.random.key(seed), x, train=False), x


def test_parameter_counts_by_hand():
    # 64·512 + 23·512·512, 24 biases or 24 norms of 2·512 each, and a head of 513·10.
    kernels, head = 64 * 512 + 23 * 512 * 512, 5_130
    for norm, each in (("none", 512), ("batch_norm", 2 * 512), ("rms_norm", 512 + 512)):
        variables = jax.eval_shape(lambda n=norm: started(model_of(n))[0])
        assert count_params(variables["params"]) == kernels + 24 * each + head


def mean_squares(variables, net, x):
    """Mean square of each layer's output, its activation's input: [depth]."""
    _, seen = net.apply(
        variables, x, train=True, mutable=["intermediates"], capture_intermediates=True
    )
    found = seen["intermediates"]
    return jnp.stack(
        [jnp.mean(jnp.square(found[f"dense{i}"]["__call__"][0])) for i in range(1, net.depth + 1)]
    )


@pytest.mark.parametrize(
    ("weights", "activation", "factor"),
    [
        # E[relu(z)²] = Var(z)/2, which He's 2/fan-in makes up for and LeCun's 1/fan-in does not.
        ("he", "relu", 1.0),
        ("lecun", "relu", 0.5),
        ("lecun", "identity", 1.0),
        ("he", "identity", 2.0),
    ],
)
def test_a_signal_grows_by_a_factor_per_layer(weights, activation, factor):
    net = model_of(weights=weights, activation=activation, depth=6, width=512)

    @jax.jit
    def growth(seed):
        variables, x = started(net, seed)
        squares = mean_squares(variables, net, x)
        return jnp.log(squares[-1] / squares[0]) / 5

    grown = [growth(seed) for seed in range(8)]
    # A layer's factor has a deviation of √(5/512) at most over seeds: √(5/512)/√(5·8) = 0.016.
    assert np.exp(np.mean(grown)) == pytest.approx(factor, rel=0.04)


def test_orthogonal_layers_keep_every_length():
    net = model_of(weights="orthogonal", activation="identity", depth=5, width=64)
    variables, x = started(net)
    squares = mean_squares(variables, net, x)
    np.testing.assert_allclose(squares, np.mean(np.square(x)), rtol=1e-5)
    other = model_of(weights="lecun", activation="identity", depth=5, width=64)
    assert np.ptp(mean_squares(started(other)[0], other, x)) > 0.01


def test_batch_norm_does_not_see_the_factor_between_he_and_lecun():
    he, lecun = (model_of("batch_norm", weights=weights, width=64) for weights in ("he", "lecun"))
    variables, x = started(he)
    kernels = {
        name: {**layer, "kernel": layer["kernel"] / np.sqrt(2)} if "dense" in name else layer
        for name, layer in variables["params"].items()
    }
    np.testing.assert_allclose(
        kernels["dense2"]["kernel"], started(lecun)[0]["params"]["dense2"]["kernel"], rtol=1e-5
    )
    first, second = (
        net.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])[0]
        for net, params in ((he, variables["params"]), (lecun, kernels))
    )
    np.testing.assert_allclose(first, second, rtol=0.05, atol=0.01)


def test_an_unknown_initializer_is_refused_with_the_nearest():
    config = load_config("configs/digits.py:model=deep_mlp", {"model.weights": "ortogonal"})
    with pytest.raises(UserError, match=r"model\.weights.*'ortogonal'.*orthogonal") as error:
        build_parts(config, need_data=False)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_tanh_and_linear_nets_learn_digits(tmp_path):
    import normlab

    for activation in ("tanh", "identity"):
        fields = {
            "model.depth": 4,
            "model.width": 32,
            "model.weights": "orthogonal",
            "model.activation": activation,
            "train.num_epochs": 2,
        }
        config = load_config("configs/digits.py:model=deep_mlp,norm=batch_norm", fields)
        assert normlab.train(config, tmp_path / activation)["test_accuracy"] > 0.8
