"""Signals by depth: of known arrays, of networks that theory knows, of every model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from normlab.analysis.mean_field import (
    STANDARD,
    after_layer,
    batch_norm_signals,
    normalizer_free_signals,
    plain_signals,
)
from normlab.analysis.signals import measure_signals
from normlab.analysis.subject import fresh, of_run
from normlab.config import load_config
from normlab.errors import UserError
from normlab.models.activations import gain, relu
from normlab.models.conv import he_normal
from normlab.models.signals import sow_signals
from normlab.training.loop import train
from normlab.training.probe import block_paths


def subject_of(choices, num_seeds=1, inputs="gaussian", **fields):
    names = {name.replace("__", "."): value for name, value in fields.items()}
    config = load_config(f"configs/digits.py:{choices}", names)
    return fresh(config, num_seeds=num_seeds, inputs=inputs)


def means(profile, column):
    return np.array(profile.mean(column))


# What is measured


class Known(nn.Module):
    """Shows a branch of [[1, 3], [3, 7]] and a stream of twice that, and of its negative."""

    def block(self, y):
        sow_signals(self, branch=y, stream=2 * y)

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        y = jnp.array([[1.0, 3.0], [3.0, 7.0]])
        self.block(y)
        self.block(-y)
        return x


def test_moments_of_known_arrays():
    subject = with_model(subject_of("model=mlp,norm=none"), Outer(None, None))
    profile = measure_signals(subject)
    assert profile.places == ("only/1", "only/2")
    # Channel means 2 and 5, variances 1 and 4: (4 + 25)/2 and 5/2; of the doubled four times that.
    assert profile.mean("branch_mean_squared") == [14.5, 14.5]
    assert profile.mean("branch_variance") == [2.5, 2.5]
    assert profile.mean("mean_squared") == [58.0, 58.0]
    assert profile.mean("variance") == [10.0, 10.0]


class Outer(nn.Module):
    norm: object
    conv: object

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        x = Known(name="only")(x, train=train)
        return nn.Dense(10, name="head")(x.reshape(x.shape[0], -1))


def with_model(subject, model):
    norm, conv = subject.parts.model.norm, subject.parts.model.conv
    model = model.clone(norm=norm, conv=conv)
    return dataclasses.replace(subject, parts=dataclasses.replace(subject.parts, model=model))


def test_a_model_without_blocks_shows_its_linear_layers():
    subject = subject_of("model=mlp", inputs="data", model__widths=(8, 6))
    profile = measure_signals(subject)
    assert profile.places == ("dense1", "dense2", "head")
    [draw] = subject.draws()
    x = np.asarray(draw.images, np.float64).reshape(len(draw.images), -1)
    y = x @ np.asarray(draw.variables["params"]["dense1"]["kernel"], np.float64)
    np.testing.assert_allclose(
        means(profile, "mean_squared")[0], np.mean(y.mean(0) ** 2), rtol=1e-4
    )
    np.testing.assert_allclose(means(profile, "variance")[0], np.mean(y.var(0)), rtol=1e-4)


def test_an_exploded_network_says_from_where_on_it_is_not_finite():
    """Kernels of 1e12 · identity: variances of 1e24 and 1e48, which float32 does not have."""
    fields = {"model__widths": (64, 64, 64), "model__activation": "identity"}
    subject = subject_of("model=mlp,norm=none", **fields)
    params = next(subject.draws()).variables["params"]
    kernel = {"kernel": 1e12 * np.eye(64, dtype=np.float32)}
    large = {name: params[name] | kernel for name in ("dense1", "dense2", "dense3")}
    profile = measure_signals(dataclasses.replace(subject, variables={"params": params | large}))
    assert profile.summary == {"not finite": "from dense2 on"}
    assert profile.mean("variance")[0] == pytest.approx(1e24, rel=0.1)
    assert profile.mean("variance")[1] == np.inf
    assert measure_signals(subject).summary == {}


def test_running_statistics_are_those_of_a_network_that_saw_nothing():
    subject = subject_of("model=mlp", model__widths=(8, 6, 4))
    by_batch, running = (
        measure_signals(subject, batch_statistics=use).mean("variance") for use in (True, False)
    )
    assert by_batch[0] == running[0]
    assert not np.allclose(by_batch[1:], running[1:], rtol=0.01)


# Which places


@pytest.mark.parametrize(
    ("choices", "count", "second"),
    [
        ("model=resnet20", 9, "stage1_block2"),
        ("model=resnet110", 54, "stage1_block2"),
        ("model=resnet50", 16, "stage1_block2"),
        ("model=vit_tiny", 24, "block1/2"),
        ("model=cnn", 0, None),
    ],
)
def test_residual_blocks_are_found_in_their_order(choices, count, second):
    parts = subject_of(choices).parts
    paths = block_paths(parts.model, parts.info.image_shape)
    assert len(paths) == count
    if count > 10:
        assert paths[1] == second
        number = {name: i for i, name in enumerate(paths)}
        later = "block10/1" if "block10/1" in number else "stage3_block3"
        earlier = "block2/1" if "block2/1" in number else "stage3_block2"
        assert number[earlier] < number[later]  # and not as the alphabet has it


def test_layers_in_a_loop_are_shown_too():
    profile = measure_signals(subject_of("model=rnn", model__widths=(8,)))
    assert profile.places == ("layer1/input", "layer1/cell/hidden", "head")


def test_blocks_of_a_model_without_are_refused():
    with pytest.raises(UserError, match="model 'cnn' has no residual blocks; go by layers"):
        measure_signals(subject_of("model=cnn"), by="blocks")


# At the start, against theory


class Block(nn.Module):
    """x + W φ(norm(W φ(norm(x)))), or with the normalizer behind W; α and β as they are given."""

    norm: object
    conv: object
    norm_last: bool
    alpha: float
    beta: float
    scale: float  # of the activation

    @nn.compact
    def __call__(self, x, *, train):
        y = x / self.beta
        for i in (1, 2):
            norm = self.norm(name=f"norm{i}")
            dense = self.conv.dense(
                x.shape[-1], use_bias=False, kernel_init=he_normal, name=f"dense{i}"
            )
            if self.norm_last:
                y = norm(dense(self.scale * relu(y)), train=train)
            else:
                y = dense(self.scale * relu(norm(y, train=train)))
        out = x + self.alpha * y
        sow_signals(self, branch=y, stream=out)
        return out


class Residual(nn.Module):
    """Dense residual blocks on images of N(0, 1), brought to the width by a layer of variance 1."""

    norm: object
    conv: object
    blocks: int = 6
    width: int = 512
    norm_last: bool = False
    alpha: float = 1.0
    normalizer_free: bool = False

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        x = nn.Dense(
            self.width, use_bias=False, kernel_init=nn.initializers.normal(1 / 8), name="stem"
        )(x.reshape(x.shape[0], -1))  # 64 values of variance 1 in a digit
        for k in range(self.blocks):
            x = Block(
                self.norm,
                self.conv,
                norm_last=self.norm_last,
                alpha=self.alpha,
                beta=(1 + k * self.alpha**2) ** 0.5 if self.normalizer_free else 1.0,
                scale=gain(relu) if self.normalizer_free else 1.0,
                name=f"block{k + 1}",
            )(x, train=train)
        return nn.Dense(10, name="head")(x)


def residual(choices, **fields):
    subject = subject_of(f"model=mlp,{choices}", num_seeds=2, train__batch_size=256)
    return measure_signals(with_model(subject, Residual(None, None, **fields)))


def check(profile, predicted, rtol=0.05):
    for what, part in (("", "stream"), ("branch_", "branch")):
        for name in ("mean_squared", "variance"):
            expected = [getattr(getattr(block, part), name) for block in predicted]
            found = means(profile, what + name)
            np.testing.assert_allclose(found, expected, rtol=rtol, atol=0.02)


def test_batch_norm_adds_one_a_block_and_the_split_is_that_of_relu():
    profile = residual("norm=batch_norm")
    # W φ(x̂) with He's weights: E[φ²] = 1/2 and E[φ]² = 1/2π, each times 2.
    check(profile, batch_norm_signals([False] * 6))
    steps = np.diff(means(profile, "mean_squared") + means(profile, "variance"))
    np.testing.assert_allclose(steps, 1, rtol=0.1)
    assert np.mean(steps) == pytest.approx(1, rel=0.03)
    np.testing.assert_allclose(means(profile, "branch_mean_squared"), 1 / np.pi, rtol=0.1)
    np.testing.assert_allclose(means(profile, "branch_variance"), 1 - 1 / np.pi, rtol=0.05)


def test_a_branch_that_ends_in_batch_norm_adds_one_to_the_variance_alone():
    profile = residual("norm=batch_norm", norm_last=True)
    check(profile, batch_norm_signals([False] * 6, norm_last=True))
    np.testing.assert_allclose(means(profile, "branch_variance"), 1, rtol=1e-3)
    np.testing.assert_allclose(means(profile, "branch_mean_squared"), 0, atol=1e-6)


def test_without_a_normalizer_the_stream_doubles_at_each_block():
    profile = residual("norm=none")
    moments = means(profile, "mean_squared") + means(profile, "variance")
    np.testing.assert_allclose(moments, 2.0 ** np.arange(1, 7), rtol=0.12)
    # Two networks of 512 channels; the deviations of the blocks add up.
    check(profile, plain_signals([False] * 6), rtol=0.15)


def test_normalizer_free_blocks_keep_the_branch_at_one_and_the_stream_at_1_and_k_alpha_squared():
    choices = "norm=none,conv=scaled_weight_standardization"
    profile = residual(choices, alpha=0.5, normalizer_free=True)
    check(profile, normalizer_free_signals([False] * 6, alpha=0.5), rtol=0.02)


def test_the_split_of_one_layer_is_found_in_a_plain_network():
    """dense2 of a net of relu layers with batch norm; LeCun's weights, variance 1 / fan-in."""
    fields = {"model__widths": (512, 512), "model__activation": "relu", "train__batch_size": 512}
    profile = measure_signals(subject_of("model=mlp", **fields))
    predicted = after_layer(STANDARD, relu, weight_variance=1.0)
    assert profile.mean("mean_squared")[1] == pytest.approx(predicted.mean_squared, rel=0.1)
    assert profile.mean("variance")[1] == pytest.approx(predicted.variance, rel=0.03)


# Subjects


def test_each_seed_has_its_own_network_and_the_run_of_seed_0_the_same_as_alone():
    subject = subject_of("model=mlp", num_seeds=2, model__widths=(8,))
    first, second = subject.draws()
    [alone] = subject_of("model=mlp", model__widths=(8,)).draws()
    jax.tree.map(np.testing.assert_array_equal, first, alone)
    kernels = [draw.variables["params"]["dense1"]["kernel"] for draw in (first, second)]
    assert not np.allclose(*kernels)
    assert not np.allclose(first.images, second.images)


def test_a_start_from_data_is_the_one_that_a_run_has():
    subject = subject_of(
        "model=mlp,norm=none,conv=weight_norm", model__widths=(8,), conv__data_dependent=True
    )
    [draw] = subject.draws()
    # g = 1/σ and b = −μ/σ over a batch of real images: no longer 1 and 0.
    assert not np.allclose(draw.variables["params"]["dense1"]["bias"], 0)


def test_checkpoints_of_a_run_are_probed_each_at_its_weights(tmp_path):
    fields = {
        "model.widths": (8, 6),
        "train.num_steps": 4,
        "checkpoint.every_steps": 2,
        "log.tensorboard": False,
    }
    train(load_config("configs/digits.py:model=mlp", fields), tmp_path / "run")
    early, late = (
        measure_signals(of_run(tmp_path / "run", step=step, num_seeds=2)) for step in (2, None)
    )
    assert (early.subject["step"], late.subject["step"]) == (2, 4)
    assert early.subject["input"] == "data"
    assert early.mean("variance") != late.mean("variance")
    with pytest.raises(UserError, match="no checkpoint of step 3; nearest: 2"):
        of_run(tmp_path / "run", step=3)
    with pytest.raises(UserError, match="kept no moving averages"):
        of_run(tmp_path / "run", use_ema=True)
