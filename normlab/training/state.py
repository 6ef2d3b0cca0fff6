"""The train state: everything that a step reads and writes, and that a checkpoint holds."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from normlab.models.layers import measures
from normlab.optim import clipped_fractions
from normlab.training.parallel import Compiler, seed_array
from normlab.training.setup import Parts


class Totals(struct.PyTreeNode):
    """Sums over the steps since the last line of training metrics; part of the state so that a
    resumed run writes the same line.
    """

    steps: Array  # int32, steps summed: those with finite loss, gradient and statistics
    loss: Array  # float32, sum of the steps' mean losses
    correct: Array  # int32, training examples classified correctly
    gradient_norm: Array  # float32, sum of the global L2 norms of the gradients
    nonfinite: Array  # int32, steps passed over because something was not finite
    measures: dict[str, Array]  # float32, sums of what layers measure: layer/measure

    @classmethod
    def zeros(cls, measures: Iterable[str] = ()) -> "Totals":
        """Returns sums over no steps, each an array of its own: a donated one must not be two."""
        return cls(
            steps=jnp.zeros((), jnp.int32),
            loss=jnp.zeros((), jnp.float32),
            correct=jnp.zeros((), jnp.int32),
            gradient_norm=jnp.zeros((), jnp.float32),
            nonfinite=jnp.zeros((), jnp.int32),
            measures={name: jnp.zeros((), jnp.float32) for name in measures},
        )


class Health(struct.PyTreeNode):
    """The streak of steps with a non-finite value. `culprit` indexes `CULPRITS`; 0 means none."""

    streak: Array  # int32, such steps in a row up to now
    culprit: Array  # int32, what was not finite in the streak's first step
    first_step: Array  # int32, the streak's first step, counted from 1
    diverged: Array  # bool, the streak reached its limit: no later step changes anything

    @classmethod
    def good(cls) -> "Health":
        """Returns the health of a run before its first step."""
        return cls(
            streak=jnp.zeros((), jnp.int32),
            culprit=jnp.zeros((), jnp.int32),
            first_step=jnp.zeros((), jnp.int32),
            diverged=jnp.zeros((), bool),
        )


CULPRITS = ("", "loss", "gradient", "statistic")


class TrainState(struct.PyTreeNode):
    """A pytree of arrays; `ema` is None unless `train.ema_decay` is set."""

    step: Array  # int32, steps taken
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any  # {"params", "batch_stats"}: their exponential moving averages
    totals: Totals
    health: Health

    def variables(self, use_ema: bool = False) -> dict[str, Any]:
        """Returns what `model.apply` takes; the moving averages if asked for and there."""
        if use_ema and self.ema is not None:
            return dict(self.ema)
        return {"params": self.params, "batch_stats": self.batch_stats}


def initial_state(parts: Parts, seed: Array) -> TrainState:
    """Returns the state at step 0; to be traced, so that it can be compiled or only measured.

    The initial value of a parameter depends on the seed and the parameter's path alone, so variants
    that share a seed share the values of the parameters they have in common.
    """
    images = jnp.zeros((2, *parts.info.image_shape), jnp.float32)
    variables = parts.model.init(jax.random.key(seed), images, train=False)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    opt_state = parts.direction.init(params)
    measured = [*measures(parts.model, parts.info.image_shape), *clipped_fractions(opt_state)]
    with_ema = parts.config.train.ema_decay is not None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        ema={"params": params, "batch_stats": batch_stats} if with_ema else None,
        totals=Totals.zeros(measured),
        health=Health.good(),
    )


def create_state(parts: Parts, compiler: Compiler) -> TrainState:
    """Returns the state at step 0, computed."""
    create = functools.partial(initial_state, parts)
    seed = seed_array(parts.config.seed)
    return compiler("init", create, seed)(seed)


def abstract_state(parts: Parts) -> TrainState:
    """Returns the shapes and dtypes of the state, without computing anything, however large."""
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    return jax.eval_shape(functools.partial(initial_state, parts), seed)
