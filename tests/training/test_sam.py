"""Sharpness-aware minimization: by hand, against optax's, and what the two passes leave behind."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from normlab.config import load_config
from normlab.errors import UserError
from normlab.optim import ascended
from normlab.training.parallel import Compiler
from normlab.training.setup import build_parts
from normlab.training.state import create_state
from normlab.training.step import make_loss, make_train_step

RHO = 0.1


def parts_of(norm="none", **fields):
    names = {"model.widths": (8,), "optim.schedule": "constant", "optim.sam_rho": RHO}
    names |= {name.replace("__", "."): value for name, value in fields.items()}
    return build_parts(load_config(f"configs/digits.py:model=mlp,norm={norm}", names))


def batch(seed=0):
    return jax.random.normal(jax.random.key(seed), (32, 8, 8, 1)), jnp.arange(32) % 10


def stepper(parts, sam_rho=RHO):
    return jax.jit(make_train_step(parts.model, parts.direction, parts.schedule, sam_rho=sam_rho))


def close(a, b, **how):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **how), a, b)


def test_it_climbs_by_rho_along_the_gradient():
    # g = (3, 4) has norm 5: w + 0.5·(0.6, 0.8).
    params = {"a": jnp.array([1.0]), "b": jnp.array(2.0)}
    risen = ascended(params, {"a": jnp.array([3.0]), "b": jnp.array(4.0)}, 0.5)
    close(risen, {"a": np.array([1.3]), "b": np.array(2.4)}, rtol=1e-6)


def test_at_a_stationary_point_it_stays():
    params = {"a": jnp.array([1.0, 2.0])}
    close(ascended(params, {"a": jnp.zeros(2)}, 0.5), params, rtol=0)


def test_a_step_on_a_parabola_by_hand():
    # Loss w², w = 2, ρ = 0.5: climb to 2.5, gradient 5 and not 4.
    loss = jax.grad(lambda p: jnp.sum(p["w"] ** 2))
    params = {"w": jnp.array([2.0])}
    assert float(loss(ascended(params, loss(params), 0.5))["w"][0]) == pytest.approx(5.0)


@pytest.mark.slow
def test_three_steps_are_optaxs():
    """Momentum and all, on a net without batch statistics, which optax's function cannot return."""
    parts = parts_of(optim__base_lr=0.1, optim__weight_decay=0.01)
    state, step = create_state(parts, Compiler()), stepper(parts)
    loss = make_loss(parts.model)
    outer = optax.chain(parts.direction, optax.scale(-0.1))
    climb = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    theirs = optax.contrib.sam(outer, climb, opaque_mode=True)
    params, opt_state = state.params, theirs.init(state.params)
    for number in range(3):
        state = step(state, batch(number))

        def gradient(params, _, number=number):
            return jax.grad(loss, has_aux=True)(params, {}, batch(number))[0]

        update, opt_state = theirs.update(gradient(params, 0), opt_state, params, grad_fn=gradient)
        params = optax.apply_updates(params, update)
    close(state.params, params, rtol=1e-4, atol=1e-6)
    # And it is not the plain step.
    plain = stepper(parts, None)(create_state(parts, Compiler()), batch(0))
    risen = step(create_state(parts, Compiler()), batch(0))
    assert not np.allclose(plain.params["head"]["kernel"], risen.params["head"]["kernel"])


@pytest.mark.parametrize("norm", ["batch_norm", "full_norm"])
def test_statistics_loss_and_accuracy_are_of_the_pass_at_the_weights_themselves(norm):
    parts = parts_of(norm)
    state = create_state(parts, Compiler())
    with_sam, without = stepper(parts)(state, batch()), stepper(parts, None)(state, batch())
    close(with_sam.batch_stats, without.batch_stats, rtol=1e-5, atol=1e-6)
    for name in ("loss", "correct"):
        close(getattr(with_sam.totals, name), getattr(without.totals, name), rtol=1e-6)
    assert float(with_sam.totals.gradient_norm) != float(without.totals.gradient_norm)
    # The pass at the risen weights would have left others.
    loss = make_loss(parts.model)
    gradient, _ = jax.grad(loss, has_aux=True)(state.params, state.batch_stats, batch())
    risen = ascended(state.params, gradient, RHO)
    _, (_, other, *_) = loss(risen, state.batch_stats, batch())
    mean = with_sam.batch_stats["norm1"]["mean"]
    assert not np.allclose(other["norm1"]["mean"], mean, rtol=1e-3)


def test_a_batch_with_nan_changes_nothing():
    parts = parts_of("batch_norm")
    step = stepper(parts)
    state = step(create_state(parts, Compiler()), batch())
    images, labels = batch(1)
    after = step(state, (images.at[3].set(jnp.nan), labels))
    for name in ("params", "batch_stats", "opt_state"):
        close(getattr(after, name), getattr(state, name), rtol=0)
    assert int(after.totals.nonfinite) == 1


def test_a_radius_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"'optim.sam_rho' = 0.0 must be above 0"):
        parts_of(optim__sam_rho=0.0)
