"""How a batch lies on devices and in microbatches changes no number; what it costs and saves."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import SMALL, assert_same_lines, lines, small

from normlab.config import load_config
from normlab.errors import UserError
from normlab.norms import NORMS
from normlab.training import parallel
from normlab.training.layout import Layout, over_parts
from normlab.training.loop import train
from normlab.training.setup import build_parts, id_of
from normlab.training.state import create_state
from normlab.training.step import Batch, make_gradient


def on_eight_devices(file, *arguments):
    """Runs the tests of a file in a process of eight devices: JAX counts them when it starts."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    tests = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    ended = subprocess.run(
        [*command, str(tests), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-5000:]
    assert " passed" in ended.stdout


@pytest.mark.devices
@pytest.mark.parametrize("kinds", ["batch", "not batch"])
def test_every_normalizer_with_state_is_the_same_on_any_layout(kinds):
    on_eight_devices("layouts_of_norms.py", "-k", kinds)


@pytest.mark.devices
def test_runs_are_the_same_on_any_layout():
    on_eight_devices("layouts_of_runs.py")


# The layout ---------------------------------------------------------------------------------------


def test_rows_lie_in_microbatches_each_padded_on_its_own():
    """6 examples in 2 microbatches of 3, padded to 4."""
    layout = Layout(microbatches=2, examples=3, rows=4, replicas=None)
    batch = Batch(jnp.arange(6.0)[:, None] + 1, jnp.arange(6), jax.random.key(0))
    laid = jax.jit(lambda b: parallel.lay_out(b, layout, parallel.make_mesh()))(batch)
    np.testing.assert_array_equal(laid.images[..., 0], [[1, 2, 3, 0], [4, 5, 6, 0]])
    np.testing.assert_array_equal(laid.mask, [[True, True, True, False]] * 2)
    assert laid.key.shape == ()


def test_a_batch_that_fits_has_no_mask():
    layout = parallel.make_layout(small(train__batch_size=6))
    assert not layout.padded
    batch, mesh = Batch(jnp.zeros((6, 2)), jnp.zeros(6, jnp.int32)), parallel.make_mesh()
    assert jax.jit(lambda b: parallel.lay_out(b, layout, mesh))(batch).mask is None


def test_padding_fills_whole_ghost_groups():
    """On one device with ghosts of 5, a microbatch of 10 is 2 groups and needs no padding."""
    config = small(
        train__batch_size=20,
        train__microbatches=2,
        parallel__pad_batch=True,
        batch_stats__scope="ghost",
        batch_stats__ghost_size=5,
    )
    assert parallel.make_layout(config) == Layout(2, 10, 10, None)


def test_parts_are_summed_one_by_one():
    parts = jnp.arange(6.0).reshape(3, 2)
    total = over_parts(
        lambda part: {"sum": part.sum(), "positive": (part > -1).all()},
        parts,
        3,
        lambda a, b: {"sum": a["sum"] + b["sum"], "positive": a["positive"] & b["positive"]},
    )
    assert float(total["sum"]) == 15
    assert bool(total["positive"])


def test_each_part_draws_for_itself():
    """A random key is no array of examples: each part gets one of its own."""
    drawn = over_parts(
        lambda part: jax.random.uniform(part[1], (1,)),
        (jnp.zeros((2, 1)), jax.random.key(0)),
        2,
        lambda a, b: a * 10 + b,
    )
    first, second = (jax.random.uniform(jax.random.fold_in(jax.random.key(0), i)) for i in (0, 1))
    assert float(drawn[0]) == pytest.approx(10 * float(first) + float(second))


# Microbatches ------------------------------------------------------------------------------------


def step_of(config, batch):
    """The loss, what else is seen and the gradient of one step from the start."""
    parts = build_parts(config)
    state = create_state(parts, parallel.Compiler())
    layout = parallel.make_layout(config)
    gradient = make_gradient(parts.model, microbatches=layout.microbatches)
    mesh = parallel.make_mesh()

    @jax.jit
    def one(params, batch_stats, batch):
        return gradient(params, batch_stats, parallel.lay_out(batch, layout, mesh))

    return one(state.params, state.batch_stats, batch)


def batch_of(count):
    keys = jax.random.split(jax.random.key(3))
    images = jax.random.normal(keys[0], (count, 8, 8, 1)) * jnp.arange(1, count + 1).reshape(
        -1, 1, 1, 1
    )
    return Batch(images / count, jax.random.randint(keys[1], (count,), 0, 10))


STATELESS = [kind for kind in NORMS if not NORMS[kind].stateful]
AVERAGING = [kind for kind in NORMS if NORMS[kind].stateful and NORMS[kind].averages_groups]


def mlp(kind, **fields):
    names = {name.replace("__", "."): value for name, value in fields.items()}
    changes = {"train.batch_size": 16, "model.widths": (8, 8), **names}
    return load_config(f"configs/digits.py:model=mlp,norm={kind}", changes)


@pytest.mark.parametrize("kind", ["layer_norm", "group_norm"])
def test_accumulated_gradients_are_those_of_the_large_batch(kind):
    batch = batch_of(16)
    whole = step_of(mlp(kind), batch)
    parts = step_of(mlp(kind, train__microbatches=4), batch)
    assert_close(parts, whole)


@pytest.mark.parametrize("kind", AVERAGING)
def test_ghost_statistics_by_microbatch_are_those_of_the_large_batch(kind):
    """Its output, gradient, and new running statistics: groups of 4 in 16, or twice in 8."""
    ghost = {"batch_stats__scope": "ghost", "batch_stats__ghost_size": 4}
    batch = batch_of(16)
    whole = step_of(mlp(kind, **ghost), batch)
    parts = step_of(mlp(kind, train__microbatches=2, **ghost), batch)
    assert_close(parts, whole)
    moved = jax.tree.leaves(whole[1].batch_stats)
    start = jax.tree.leaves(create_state(build_parts(mlp(kind)), parallel.Compiler()).batch_stats)
    assert any(not np.array_equal(a, b) for a, b in zip(moved, start, strict=True))


def assert_close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected
    )


def test_microbatches_of_global_statistics_would_be_another_normalizer():
    """The negative: with each half normalized by itself the gradient is not the large batch's."""
    batch = batch_of(16)
    whole = step_of(mlp("batch_norm"), batch)
    halves = {"batch_stats__scope": "ghost", "batch_stats__ghost_size": 8}
    parts = step_of(mlp("batch_norm", train__microbatches=2, **halves), batch)
    difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), parts[2], whole[2])
    assert max(jax.tree.leaves(difference)) > 1e-3


@pytest.mark.parametrize(
    ("norm", "fields", "message"),
    [
        ("batch_norm", {}, "scope 'global' need the whole batch.*'train.remat' = true"),
        ("batch_norm", {"batch_stats__scope": "device"}, "scope 'device' need the whole batch"),
        ("power_norm", {}, "statistics of 'power_norm' are of whole batches; 'train.remat'"),
        (
            "batch_group_norm",
            {"batch_stats__scope": "ghost", "batch_stats__ghost_size": 8},
            "statistics of 'batch_group_norm' are of whole batches",
        ),
        (
            "batch_norm",
            {"batch_stats__scope": "ghost", "batch_stats__ghost_size": 64},
            "ghost size 64 does not divide microbatches of 32",
        ),
    ],
)
def test_statistics_that_microbatches_would_change_are_refused(norm, fields, message):
    config = small(norm, train__batch_size=128, train__microbatches=4, **fields)
    with pytest.raises(UserError, match=message):
        build_parts(config)


def test_microbatches_divide_the_batch():
    with pytest.raises(UserError, match="= 3 does not divide the batch of 128; nearest: 2"):
        parallel.make_layout(small(train__microbatches=3, train__batch_size=128))


def test_the_layout_is_no_part_of_a_runs_identity():
    layout = {"train__microbatches": 2, "train__remat": True, "parallel__mode": "pmap"}
    assert id_of(small("layer_norm", **layout)) == id_of(small("layer_norm"))


def test_microbatches_that_drop_each_for_itself_are_another_run():
    def run_id(**fields):
        changes = {name.replace("__", "."): value for name, value in fields.items()}
        return id_of(load_config("configs/digits.py:model=preact_resnet20", changes))

    assert run_id(train__microbatches=2) == run_id()
    dropped = run_id(model__dropout=0.5)
    assert run_id(model__dropout=0.5, train__microbatches=2) != dropped
    assert run_id(model__dropout=0.5, train__microbatches=1) == dropped


def test_a_run_in_microbatches_is_the_run(tmp_path):
    train(small("layer_norm"), tmp_path / "whole")
    train(small("layer_norm", train__microbatches=2), tmp_path / "parts")
    assert_same_lines(lines(tmp_path / "parts"), lines(tmp_path / "whole"))


# Memory ------------------------------------------------------------------------------------------

DEEP = {"train.batch_size": 64, "model.width": 8, "model.stage_sizes": (4, 4, 4)}


def compiled_step(**fields):
    config = load_config("configs/digits.py:model=resnet20", DEEP | fields)
    parts = build_parts(config)
    state = create_state(parts, parallel.Compiler())
    batch = Batch(
        jnp.ones((64, 8, 8, 1)) * jnp.arange(64.0)[:, None, None, None], jnp.arange(64) % 10
    )
    layout = parallel.make_layout(config)
    gradient = make_gradient(parts.model, microbatches=layout.microbatches)
    mesh = parallel.make_mesh()

    def one(params, batch_stats, batch):
        return gradient(params, batch_stats, parallel.lay_out(batch, layout, mesh))

    arguments = (state.params, state.batch_stats, batch)
    compiled = parallel.Compiler(parallel.in_order(config))("step", one, *arguments)
    return compiled.memory_analysis().temp_size_in_bytes, compiled(*arguments)


@pytest.mark.devices
def test_rematerialized_blocks_give_the_large_batchs_numbers_in_less_memory():
    plain, expected = compiled_step()
    less, found = compiled_step(**{"train.remat": True})
    assert less < 0.7 * plain
    assert_close(found, expected)


@pytest.mark.devices
def test_microbatches_take_less_memory():
    ghost = {"batch_stats.scope": "ghost", "batch_stats.ghost_size": 16}
    plain, expected = compiled_step(**ghost)
    less, found = compiled_step(**ghost, **{"train.microbatches": 4})
    assert less < 0.5 * plain
    assert_close(found, expected)


def test_a_net_without_blocks_cannot_rematerialize_them():
    with pytest.raises(UserError, match="model 'cnn' has no residual blocks"):
        build_parts(small(train__remat=True))


def test_a_result_has_its_high_water_mark(tmp_path):
    result = train(small(train__num_steps=2), tmp_path / "run")
    assert 50e6 < result["peak_memory_bytes"] < 50e9  # Python and JAX alone take some 200 MB
    data = 1797 * 8 * 8
    assert data < result["step_memory_bytes"] < result["peak_memory_bytes"]


def test_in_bfloat16_parameters_statistics_and_logits_are_float32():
    fields = SMALL | {"model.dtype": "bfloat16"}
    config = load_config("configs/digits.py:norm=batch_norm", fields)
    parts = build_parts(config)
    state = create_state(parts, parallel.Compiler())
    kept = jax.tree.leaves((state.params, state.batch_stats, state.opt_state))
    assert {leaf.dtype for leaf in kept if leaf.ndim} == {jnp.dtype("float32")}
    step = jax.make_jaxpr(make_gradient(parts.model))
    text = str(step(state.params, state.batch_stats, batch_of(4)))
    products = [line for line in text.splitlines() if "conv_general_dilated[" in line]
    assert products
    assert all(":bf16[" in line.partition("=")[0] for line in products[:2])
    loss, seen, gradient = jax.eval_shape(
        make_gradient(parts.model), state.params, state.batch_stats, batch_of(4)
    )
    of_step = jax.tree.leaves((loss, seen.batch_stats, gradient))
    assert {leaf.dtype for leaf in of_step if leaf.ndim} <= {jnp.dtype("float32")}
