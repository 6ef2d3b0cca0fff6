"""What a step holds in memory: by hand, and against XLA's own plan."""

import functools

import jax
import jax.numpy as jnp
import pytest

from normlab.config import load_config
from normlab.training.memory import estimate, residual_bytes
from normlab.training.setup import build_parts
from normlab.training.state import initial_state
from normlab.training.step import make_train_step


def parts_of(source="configs/digits.py", **fields):
    names = {name.replace("__", "."): value for name, value in fields.items()}
    return build_parts(load_config(source, names), need_data=False)


def test_what_the_backward_pass_keeps_by_hand():
    x, w = jnp.ones((5, 2)), jnp.ones((2, 3))
    # sin keeps the cosine of 5·3 numbers of 4 bytes; the product keeps x, which it was given.
    assert residual_bytes(lambda w, x: (jnp.sum(jnp.sin(x @ w)), 0), w, x) == 60

    def product_with_itself(w, x):
        y = x @ w
        return jnp.sum(y * y), 0

    # y is kept for both factors, and is one array.
    assert residual_bytes(product_with_itself, w, x) == 60
    # The gradient of a linear function needs nothing of the forward pass but its inputs.
    assert residual_bytes(lambda w, x: (jnp.sum(x @ w), 0), w, x) == 0


def test_the_parts_that_follow_from_the_config():
    source = "configs/digits.py:model=mlp,norm=none,optimizer=adamw"
    found = estimate(parts_of(source, train__ema_decay=0.9))
    # 64·100 + 100 + twice 100·100 + 100, + 100·10 + 10 = 27,710 numbers.
    assert found["parameters"] == found["gradients"] == found["moving averages"] == 4 * 27_710
    # Two moments of each, and Adam's counter.
    assert found["optimizer state"] == 2 * 4 * 27_710 + 4
    assert found["batch statistics"] == 0
    # 1437 + 360 images of 64 bytes and labels of 4; 64 images of 64 floats and labels.
    assert found["data set"] == 1797 * 68
    assert found["batch"] == 64 * (4 * 64 + 4)
    assert found["peak"] == sum(size for what, size in found.items() if what != "peak")


def test_activations_grow_with_the_batch_and_nothing_else_does():
    one, two = (estimate(parts_of(train__batch_size=size)) for size in (64, 128))
    assert two["activations"] == pytest.approx(2 * one["activations"], rel=0.02)
    same = one.keys() - {"activations", "batch", "peak"}
    assert {name: one[name] for name in same} == {name: two[name] for name in same}


def test_microbatches_and_rematerialization_keep_less():
    """Of a quarter of the batch a quarter; of a block its input alone."""
    config = "configs/digits.py:model=resnet20,norm=layer_norm"
    plain, parts, inputs = (
        estimate(build_parts(load_config(config, changes)))["activations"]
        for changes in ({}, {"train.microbatches": 4}, {"train.remat": True})
    )
    assert parts == pytest.approx(plain / 4, rel=0.01)
    assert inputs < 0.3 * plain


def test_half_the_precision_takes_less():
    whole, half = (
        estimate(parts_of("configs/cifar10.py:model=resnet20", **fields))
        for fields in ({}, {"model__dtype": "bfloat16"})
    )
    assert 0.4 < half["activations"] / whole["activations"] < 0.8


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", "none"])
def test_the_peak_is_near_what_xla_plans(norm):
    parts = parts_of(f"configs/digits.py:norm={norm}")
    state = jax.eval_shape(functools.partial(initial_state, parts), jnp.uint32(0))
    size = parts.length.batch_size
    batch = jnp.zeros((size, *parts.info.image_shape)), jnp.zeros((size,), jnp.int32)
    step = make_train_step(parts.model, parts.direction, parts.schedule)
    plan = jax.jit(step, donate_argnums=0).lower(state, batch).compile().memory_analysis()
    planned = plan.temp_size_in_bytes + plan.argument_size_in_bytes
    planned += plan.output_size_in_bytes - plan.alias_size_in_bytes
    found = estimate(parts)
    assert 1 / 1.1 < (found["peak"] - found["data set"]) / planned < 1.6
