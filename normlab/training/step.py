"""One step of training: a pure function of (state, batch)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax import Array

from normlab.norms import join_state, split_state
from normlab.optim import ascended, clipped_fractions
from normlab.optim.schedules import Schedule
from normlab.training.state import CULPRITS, Health, Totals, TrainState


class Batch(NamedTuple):
    """What a step is a function of, beside the state. A pair (images, targets) will do."""

    images: Array  # float32 [N, H, W, C]
    targets: Array  # labels int32 [N], or probabilities of the classes float32 [N, K]
    key: Array | None = None  # of dropout and stochastic depth; None: there is neither


def cross_entropy(logits: Array, targets: Array, smoothing: float = 0.0) -> Array:
    """Returns the cross entropy of each example in nats: logits [N, K] -> [N].

    `targets`: labels int32 [N], or probabilities [N, K]. Label smoothing (Szegedy et al. 2016,
    arXiv:1512.00567, section 7): the target is (1 - smoothing) target + smoothing / K.
    """
    if targets.ndim == 1:
        targets = jax.nn.one_hot(targets, logits.shape[-1], dtype=jnp.float32)
    targets = optax.smooth_labels(targets, smoothing)
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def make_loss(model: nn.Module, label_smoothing: float = 0.0) -> Callable[..., tuple[Array, Any]]:
    """Returns `loss(params, batch_stats, batch) -> (mean loss, (correct, batch_stats, sound,
    measures))`.

    `correct`: int32, examples classified as the label, or as the likeliest class of what is mixed;
    `sound`: bool, the new statistics are finite; `measures`: what normalizers measured, by
    layer/measure.
    """

    def loss(params: Any, batch_stats: Any, batch: Batch) -> tuple[Array, Any]:
        images, targets, key = Batch(*batch)
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updated = model.apply(
            variables,
            images,
            train=True,
            mutable=["batch_stats", "nonfinite", "measures"],
            rngs=None if key is None else {"dropout": key},
        )
        mean = jnp.mean(cross_entropy(logits, targets, label_smoothing))
        labels = targets if targets.ndim == 1 else jnp.argmax(targets, -1)
        correct = jnp.sum(jnp.argmax(logits, -1) == labels)
        new_stats = updated.get("batch_stats", {})
        # A normalizer keeps its state from a statistic that is not finite, and says so.
        kept = jax.tree.leaves(updated.get("nonfinite", {}))
        sound = _all_finite(new_stats) & ~jnp.any(jnp.array([jnp.any(x) for x in kept], bool))
        measured = flatten_dict(updated.get("measures", {}), sep="/")
        measures = {name: jnp.mean(value) for name, value in measured.items()}
        return mean, (correct.astype(jnp.int32), new_stats, sound, measures)

    return loss


def make_train_step(
    model: nn.Module,
    direction: optax.GradientTransformation,
    schedule: Schedule,
    *,
    label_smoothing: float = 0.0,
    ema_decay: float | None = None,
    ema_warmup: bool = False,
    sam_rho: float | None = None,
    max_nonfinite: int = 10,
) -> Callable[[TrainState, Batch], TrainState]:
    """Returns `train_step(state, batch) -> state`.

    A step whose loss, gradient or new statistics are not finite changes no parameter, statistic,
    average or optimizer state; it is counted. After `max_nonfinite` of them in a row the state is
    marked as diverged and no later step changes it, its count of steps included.

    With `sam_rho` the gradient, also that which is guarded and logged, is taken at `optim.ascended`
    weights, and all else at the weights themselves.
    """

    loss_of = make_loss(model, label_smoothing)

    def split_loss(params: Any, backward: Any, others: Any, batch: Batch) -> tuple[Array, Any]:
        return loss_of(params, join_state(others, backward), batch)

    # A statistic of the backward pass comes out as the gradient by its old value.
    gradient_of = jax.value_and_grad(split_loss, argnums=(0, 1), has_aux=True)

    def train_step(state: TrainState, batch: Batch) -> TrainState:
        (loss, (correct, batch_stats, sound, measures)), (gradient, backward) = gradient_of(
            state.params, *split_state(state.batch_stats), batch
        )
        batch_stats, sound = join_state(batch_stats, backward), sound & _all_finite(backward)
        if sam_rho is not None:
            risen = ascended(state.params, gradient, sam_rho)
            _, (gradient, _) = gradient_of(risen, *split_state(state.batch_stats), batch)
        gradient_norm = optax.tree.norm(gradient)
        update, opt_state = direction.update(gradient, state.opt_state, state.params)
        measures = {**measures, **clipped_fractions(opt_state)}
        rate = schedule(state.step)
        params = jax.tree.map(lambda w, u: w - rate.astype(w.dtype) * u, state.params, update)
        decay: Array | float | None = ema_decay
        if ema_decay is not None and ema_warmup:
            decay = warmed_up(ema_decay, state.step)
        ema = _average(state.ema, {"params": params, "batch_stats": batch_stats}, decay)

        finite = [jnp.isfinite(loss), jnp.isfinite(gradient_norm), sound]
        accepted = jnp.all(jnp.stack(finite)) & ~state.health.diverged
        candidate = state.replace(
            params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema
        )
        state_after = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), candidate, state)
        totals = state.totals

        def add(total: Array, value: Array) -> Array:
            return total + jnp.where(accepted, value, 0.0)

        return state_after.replace(
            step=state.step + ~state.health.diverged,
            totals=Totals(
                steps=totals.steps + accepted,
                loss=add(totals.loss, loss),
                correct=totals.correct + jnp.where(accepted, correct, 0),
                gradient_norm=add(totals.gradient_norm, gradient_norm),
                nonfinite=totals.nonfinite + (~accepted & ~state.health.diverged),
                measures={
                    name: add(total, measures[name]) for name, total in totals.measures.items()
                },
            ),
            health=_judge(state.health, jnp.stack(finite), state.step + 1, max_nonfinite),
        )

    return train_step


def warmed_up(decay: float, step: Array | int) -> Array:
    """Returns min(decay, (1 + t)/(10 + t)) at step t from 0, the rule of TensorFlow's average.

    NFNets' code has it (deepmind-research/nfnets, utils.py): the first values weigh soon nothing.
    """
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def _average(ema: Any, new: Any, decay: Array | float | None) -> Any:
    """Returns decay·ema + (1 - decay)·new; an integer counter is taken over, never averaged."""
    if ema is None or decay is None:
        return None

    def average(old: Array, value: Array) -> Array:
        if not jnp.issubdtype(value.dtype, jnp.floating):
            return value
        return decay * old + (1.0 - decay) * value

    return jax.tree.map(average, ema, new)


def _all_finite(tree: Any) -> Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return (
        jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))
        if floats
        else jnp.array(True)
    )


def _judge(health: Health, finite: Array, step: Array, limit: int) -> Health:
    """Returns the health after a step; `finite` bool [3] in the order of `CULPRITS[1:]`."""
    assert len(CULPRITS) == 1 + finite.shape[0]
    bad = ~jnp.all(finite)
    starts = bad & (health.streak == 0)
    streak = jnp.where(bad, health.streak + 1, 0)
    after = Health(
        streak=streak,
        culprit=jnp.where(starts, jnp.argmin(finite).astype(jnp.int32) + 1, health.culprit),
        first_step=jnp.where(starts, step, health.first_step),
        diverged=streak >= limit,
    )
    return jax.tree.map(lambda new, old: jnp.where(health.diverged, old, new), after, health)
