"""Wide residual networks and SkipInit: counts, dropout in blocks, the identity at the start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from signal_nets import net_of, noise, signals, start

from normlab.config import load_config
from normlab.models import build, count_params
from normlab.models.wide_resnet import SkipInitResNet, WideResNet

TINY = {"depth": 16, "widen_factor": 1}


def count_of(source, **fields):
    overrides = {f"model.{field}": value for field, value in fields.items()}
    net = build(load_config(f"configs/cifar10.py:{source}", overrides))
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(lambda k, x: net.init(k, x, train=False), key, images)
    return count_params(shapes["params"])


def kernels(n, k):
    """Stem; for each stage n blocks of two 3×3, the first from the channels before, a shortcut."""
    total, before = 3 * 9 * 16, 16
    for out in (16 * k, 32 * k, 64 * k):
        total += 9 * before * out + (2 * n - 1) * 9 * out * out
        total += before * out if before != out else 0
        before = out
    return total


def norms(n, k):
    """Scales and offsets: each block's first normalizer is of the channels before it."""
    total, before = 0, 16
    for out in (16 * k, 32 * k, 64 * k):
        total += 2 * (before + (2 * n - 1) * out)
        before = out
    return total + 2 * before


@pytest.mark.parametrize(
    ("depth", "k", "count"),
    [
        (28, 10, 36_479_194),  # Zagoruyko & Komodakis 2016, table 4: 36.5M
        (16, 8, kernels(2, 8) + norms(2, 8) + 5130),  # 11.0M
        (40, 4, kernels(6, 4) + norms(6, 4) + 2570),  # 8.9M
        (40, 1, kernels(6, 1) + norms(6, 1) + 650),  # 0.6M; the first stage needs no shortcut
    ],
)
def test_parameters_of_wide_resnets(depth, k, count):
    assert count_of("model=wide_resnet", depth=depth, widen_factor=k) == count


def test_published_counts():
    millions = {(28, 10): 36.5, (16, 8): 11.0, (40, 4): 8.9, (40, 1): 0.6}
    for (depth, k), published in millions.items():
        n = (depth - 4) // 6
        count = kernels(n, k) + norms(n, k) + (64 * k + 1) * 10
        assert round(count / 1e6, 1) == published
    assert kernels(4, 10) + norms(4, 10) + 6410 == 36_479_194


def test_skipinit_has_biases_in_place_of_norms_and_a_scalar_a_block():
    # WRN-16-2 with 3·2 blocks; biases: the stem's 16, and a stage's 2·2 convolutions' and its
    # shortcut's of 32, 64 and 128 channels.
    biases = 16 + 5 * (32 + 64 + 128)
    assert count_of("model=skipinit_resnet") == kernels(2, 2) + biases + 6 + 1290


@pytest.mark.slow
def test_dropout_in_blocks_stands_before_the_last_convolution():
    net = net_of(WideResNet, depth=10, widen_factor=1, block_dropout=0.5)
    x = noise(0, (4, 8, 8, 3))
    plain = net.clone(block_dropout=0.0)
    variables = start(net, x)

    def branch(net, **how):
        return signals(net, variables, x, **how)["stage1_block1"]["branch"]

    key = {"rngs": {"dropout": jax.random.key(1)}, "train": True}
    np.testing.assert_array_equal(branch(net), branch(plain))
    np.testing.assert_array_equal(branch(net, train=True), branch(plain))
    dropped = branch(net, **key)
    assert not np.allclose(dropped, branch(plain))
    # It is linear behind the dropout: over many keys the mean is that without.
    keys = jax.random.split(jax.random.key(2), 100)
    mean = jax.jit(
        jax.vmap(
            lambda key: net.apply(
                variables, x, train=True, rngs={"dropout": key}, mutable=["signals"]
            )[1]["signals"]["stage1_block1"]["branch"][0]
        )
    )(keys).mean(0)
    error = np.linalg.norm(mean - branch(plain)) / np.linalg.norm(branch(plain))
    # 100 draws leave a tenth of one draw's deviation, which is about the signal's own size.
    assert error < 0.2
    assert np.linalg.norm(dropped - branch(plain)) / np.linalg.norm(branch(plain)) > 0.4


@pytest.mark.slow
@pytest.mark.parametrize("start_value", [0.0, 0.5])
def test_skipinit_multiplies_the_branch(start_value):
    net, x = net_of(SkipInitResNet, **TINY, skip_gain=start_value), noise(0, (2, 8, 8, 3))
    found = signals(net, start(net, x), x)
    for stage in (1, 2, 3):
        before = found[f"stage{stage}_block1"]["stream"]
        block = found[f"stage{stage}_block2"]
        np.testing.assert_allclose(
            block["stream"], before + start_value * block["branch"], rtol=1e-5, atol=1e-5
        )
        assert float(jnp.abs(block["branch"]).max()) > 0.1
