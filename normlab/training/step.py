"""One step of training: a pure function of (state, batch)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax import Array
from jax.sharding import Mesh

from normlab.data import dropout_key, training_batch
from normlab.norms import join_state, split_state
from normlab.optim import ascended, clipped_fractions
from normlab.optim.schedules import Schedule
from normlab.training import parallel
from normlab.training.layout import Layout, over_parts
from normlab.training.setup import Parts
from normlab.training.state import CULPRITS, Health, Totals, TrainState


class Batch(NamedTuple):
    """What a step is a function of, beside the state. A pair (images, targets) will do.

    With microbatches each array but the key has their number as an axis before the others.
    """

    images: Array  # float32 [N, H, W, C]
    targets: Array  # labels int32 [N], or probabilities of the classes float32 [N, K]
    key: Array | None = None  # of dropout and stochastic depth; None: there is neither
    mask: Array | None = None  # bool [N], false where an example is padding; None: nowhere


class Seen(NamedTuple):
    """What a forward pass in training leaves beside its loss."""

    correct: Array  # int32, examples classified as the label, or the likeliest class of a mixture
    batch_stats: Any  # the new statistics
    sound: Array  # bool, they are finite
    measures: dict[str, Array]  # what normalizers measured, by layer/measure


def cross_entropy(logits: Array, targets: Array, smoothing: float = 0.0) -> Array:
    """Returns the cross entropy of each example in nats: logits [N, K] -> [N].

    `targets`: labels int32 [N], or probabilities [N, K]. Label smoothing (Szegedy et al. 2016,
    arXiv:1512.00567, section 7): the target is (1 - smoothing) target + smoothing / K.
    """
    if targets.ndim == 1:
        targets = jax.nn.one_hot(targets, logits.shape[-1], dtype=jnp.float32)
    targets = optax.smooth_labels(targets, smoothing)
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def make_loss(
    model: nn.Module, label_smoothing: float = 0.0, axis_name: str | None = None
) -> Callable[..., tuple[Array, Seen]]:
    """Returns `loss(params, batch_stats, batch) -> (mean loss, Seen)`.

    With `axis_name` both are of a replica's share: the sum over replicas is the mean loss.
    """

    def loss(params: Any, batch_stats: Any, batch: Batch) -> tuple[Array, Seen]:
        images, targets, key, mask = Batch(*batch)
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updated = model.apply(
            variables,
            images,
            train=True,
            mask=mask,
            mutable=["batch_stats", "nonfinite", "measures"],
            rngs=None if key is None else {"dropout": key},
        )
        mean = _part_of_mean(cross_entropy(logits, targets, label_smoothing), mask, axis_name)
        labels = targets if targets.ndim == 1 else jnp.argmax(targets, -1)
        hits = jnp.argmax(logits, -1) == labels
        correct = jnp.sum(hits if mask is None else hits & mask)
        new_stats = updated.get("batch_stats", {})
        # A normalizer keeps its state from a statistic that is not finite, and says so.
        kept = jax.tree.leaves(updated.get("nonfinite", {}))
        sound = _all_finite(new_stats) & ~jnp.any(jnp.array([jnp.any(x) for x in kept], bool))
        measured = flatten_dict(updated.get("measures", {}), sep="/")
        measures = {name: jnp.mean(value) for name, value in measured.items()}
        return mean, Seen(correct.astype(jnp.int32), new_stats, sound, measures)

    return loss


def _part_of_mean(values: Array, mask: Array | None, axis_name: str | None) -> Array:
    """Returns the mean of values [N] that are not masked; of a replica, its part of that mean."""
    if mask is None:
        mean = jnp.mean(values)
        return mean if axis_name is None else mean / jax.lax.axis_size(axis_name)
    count = jnp.sum(mask)
    if axis_name is not None:
        count = jax.lax.psum(count, axis_name)
    return jnp.sum(jnp.where(mask, values, 0.0)) / count


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
    microbatches: int = 1,
    axis_name: str | None = None,
) -> Callable[[TrainState, Batch], TrainState]:
    """Returns `train_step(state, batch) -> state`.

    A step whose loss, gradient or new statistics are not finite changes no parameter, statistic,
    average or optimizer state; it is counted. After `max_nonfinite` of them in a row the state is
    marked as diverged and no later step changes it, its count of steps included.

    With `sam_rho` the gradient, also that which is guarded and logged, is taken at `optim.ascended`
    weights, and all else at the weights themselves.

    The step is that of the whole batch however it lies: in `microbatches`, each of which starts
    from the state before the step, or, in a replica, over the devices of `axis_name`.
    """

    gradient_of = make_gradient(model, label_smoothing, microbatches, axis_name)

    def train_step(state: TrainState, batch: Batch) -> TrainState:
        batch = Batch(*batch)
        loss, (correct, batch_stats, sound, measures), gradient = gradient_of(
            state.params, state.batch_stats, batch
        )
        if sam_rho is not None:
            risen = ascended(state.params, gradient, sam_rho)
            _, _, gradient = gradient_of(risen, state.batch_stats, batch)
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


def how_to_step(
    parts: Parts, mesh: Mesh
) -> tuple[Callable[[TrainState, Batch], TrainState], parallel.MakeBatch, Layout, Mesh]:
    """Returns (train_step, make_batch, layout, mesh): what `parallel.take_steps` needs of a run."""
    config = parts.config

    def make_batch(data: Any, seed: Array, step: Array, indices: Array) -> Batch:
        made = training_batch(data, config.data, parts.info, seed, step, indices)
        return Batch(*made, key=dropout_key(seed, step))

    train_step = make_train_step(
        parts.replica,
        parts.direction,
        parts.schedule,
        label_smoothing=config.train.label_smoothing,
        ema_decay=config.train.ema_decay,
        ema_warmup=config.train.ema_warmup,
        sam_rho=config.optim.sam_rho,
        max_nonfinite=config.train.max_nonfinite,
        microbatches=config.train.microbatches,
        axis_name=parallel.axis_name(config),
    )
    return train_step, make_batch, parallel.make_layout(config), mesh


def make_gradient(
    model: nn.Module,
    label_smoothing: float = 0.0,
    microbatches: int = 1,
    axis_name: str | None = None,
) -> Callable[[Any, Any, Batch], tuple[Array, Seen, Any]]:
    """Returns `gradient(params, batch_stats, batch) -> (mean loss, Seen, gradient by params)`.

    All three are of the whole batch: averaged over `microbatches`, and over replicas if there is an
    `axis_name`. New statistics are averaged over microbatches as over groups of one batch.
    """
    loss_of = make_loss(model, label_smoothing, axis_name)

    def split_loss(params: Any, backward: Any, others: Any, batch: Batch) -> tuple[Array, Seen]:
        return loss_of(params, join_state(others, backward), batch)

    # A statistic of the backward pass comes out as the gradient by its old value.
    split_gradient = jax.value_and_grad(split_loss, argnums=(0, 1), has_aux=True)

    def of_part(params: Any, batch_stats: Any, batch: Batch) -> tuple[Array, Seen, Any]:
        (loss, seen), (gradient, backward) = split_gradient(
            params, *split_state(batch_stats), batch
        )
        seen = seen._replace(
            batch_stats=join_state(seen.batch_stats, backward),
            sound=seen.sound & _all_finite(backward),
        )
        return loss, seen, gradient

    def of_batch(params: Any, batch_stats: Any, batch: Batch) -> tuple[Array, Seen, Any]:
        if microbatches == 1:
            return of_part(params, batch_stats, batch)
        sums = over_parts(
            lambda part: of_part(params, batch_stats, part), batch, microbatches, _add
        )
        loss, seen, gradient = jax.tree.map(
            lambda x: x / microbatches if jnp.issubdtype(x.dtype, jnp.floating) else x, sums
        )
        return loss, seen, gradient

    def of_replicas(params: Any, batch_stats: Any, batch: Batch) -> tuple[Array, Seen, Any]:
        loss, seen, gradient = of_batch(params, batch_stats, batch)
        loss, correct, unsound, gradient = jax.lax.psum(
            (loss, seen.correct, (~seen.sound).astype(jnp.int32), gradient), axis_name
        )
        measures = jax.lax.pmean(seen.measures, axis_name)
        return loss, Seen(correct, seen.batch_stats, unsound == 0, measures), gradient

    return of_batch if axis_name is None else of_replicas


def _add(total: tuple[Array, Seen, Any], part: tuple[Array, Seen, Any]) -> tuple[Array, Seen, Any]:
    """Returns the sums over microbatches; a counter among the statistics is as of the last one."""

    def plus(a: Array, b: Array) -> Array:
        return a + b

    def statistic(a: Array, b: Array) -> Array:
        return a + b if jnp.issubdtype(b.dtype, jnp.floating) else b

    seen = Seen(
        correct=total[1].correct + part[1].correct,
        batch_stats=jax.tree.map(statistic, total[1].batch_stats, part[1].batch_stats),
        sound=total[1].sound & part[1].sound,
        measures=jax.tree.map(plus, total[1].measures, part[1].measures),
    )
    return total[0] + part[0], seen, jax.tree.map(plus, total[2], part[2])


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
