"""Gradients by depth. Yang et al. 2019, arXiv:1902.08129; `mean_field` has the theory.

Of each place: the L2 norm of the gradient by the place's output, over the whole batch, its square,
and how many times larger the *square* is than that of the next place, nearer to the loss. The
papers' factors (π / (π − 1) = 1.467 with ReLU) are those of the square; the norm grows by the root.

Places are the normalizers, whose outputs are what enters an activation, the identity `none` among
them; the linear layers but the last, the head, where a model has no normalizer; and of a residual
network its blocks, one place a block, however many branches it has. (By the input of a normalizer
the gradient would be as many times larger as that input is smaller.) What is differentiated is the
mean cross entropy of the batch, or, as theory has it, a random linear function of the logits.

The gradient by a layer's output is that by a zero array added to it, so nothing is asked of a
model. Of a layer in a loop (a recurrent cell) it is the sum over the loop's steps.
"""

import itertools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from normlab.analysis.predictions import predicted_growth
from normlab.analysis.signals import describe, linear_paths, place_kind
from normlab.analysis.subject import Subject
from normlab.errors import UserError, unknown
from normlab.models.layers import norm_layers
from normlab.report.profiles import Profile, first_not_finite
from normlab.training.probe import block_paths
from normlab.training.step import cross_entropy

OBJECTIVES = ("loss", "functional")


def measure_gradients(
    subject: Subject,
    *,
    by: str | None = None,
    objective: str = "loss",
    batch_statistics: bool = True,
) -> Profile:
    """Returns gradient_norm, squared_gradient_norm and growth (of the square) of each place.

    `objective` "functional": Σ r·logits with r ~ N(0, 1) in place of the loss. `by` and
    `batch_statistics` as of `measure_signals`. The summary has the growth a place: the geometric
    mean from the last place to the first, over all seeds. Numbers that are not finite stay as they
    are, and the summary says so; likewise if all are zero.
    """
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    chosen = place_kind(subject, by)
    model = subject.parts.model
    places = output_shapes(subject, chosen, train=batch_statistics)
    names = list(places)

    @jax.jit
    def squares(variables: Any, images: Array, labels: Array, functional: Array) -> list[Array]:
        def value(shifts: dict[str, Array]) -> Array:
            logits = _shifted(model, variables, images, batch_statistics, shifts)
            if objective == "functional":
                return jnp.sum(functional * logits)
            return jnp.mean(cross_entropy(logits, labels))

        found = jax.grad(value)({name: jnp.zeros(y.shape, y.dtype) for name, y in places.items()})
        return [jnp.sum(jnp.square(found[name].astype(jnp.float32))) for name in names]

    seeds, rows, heads = [], [], []
    for draw in subject.draws():
        key = jax.random.fold_in(jax.random.key(draw.seed), 1)
        functional = jax.random.normal(key, (len(draw.labels), subject.parts.info.num_classes))
        found = squares(draw.variables, draw.images, draw.labels, functional)
        seeds.append(draw.seed)
        rows.append([float(square) for square in jax.device_get(found)])
        heads.append(_is_zero(draw.variables["params"].get("head", {}).get("kernel")))
    growths = [_growths(row) for row in rows]
    expected = predicted_growth(subject) if batch_statistics and chosen == "layers" else None
    summary: dict[str, float | str | None] = {
        "growth of the squared norm a place": _geometric_mean(rows)
    }
    if not any(map(any, rows)):
        why = ": the head's weights are 0" if all(heads) else ""
        summary["gradient"] = f"zero everywhere{why}"
    nearest = first_not_finite(names[::-1], [row[::-1] for row in rows])
    if nearest is not None:
        summary["not finite"] = f"from {nearest} on, back to the input"
    predicted: dict[str, list[float | None]] = {}
    if expected is not None:
        factor, to_go = expected[0], range(len(names) - 1, -1, -1)
        last = math.fsum(row[-1] for row in rows) / len(rows)
        predicted = {
            "squared_gradient_norm": [last * factor**k for k in to_go],
            "growth": [factor if k else None for k in to_go],
        }
        summary[f"predicted, {expected[1]}"] = expected[0]
    return Profile(
        probe="gradients",
        title=f"Gradients by depth: {subject.parts.config.model.kind}",
        subject=describe(subject)
        | {
            "places": chosen,
            "statistics": "batch" if batch_statistics else "running",
            "objective": objective,
        },
        places=tuple(names),
        seeds=tuple(seeds),
        values={
            "gradient_norm": [[math.sqrt(square) for square in row] for row in rows],
            "squared_gradient_norm": rows,
            "growth": growths,
        },
        predicted=predicted,
        drawn=("squared_gradient_norm",),
        xlabel=f"{chosen.removesuffix('s')}, from the input on",
        ylabel="squared norm of the gradient",
        summary=summary,
    )


def output_shapes(subject: Subject, chosen: str, *, train: bool) -> dict[str, Any]:
    """Returns {place: shape and dtype of its output for a batch}, in the order of the calls.

    `chosen` "blocks" or "layers". Raises UserError for a place whose output is not one array.
    """
    parts = subject.parts
    shape = parts.info.image_shape
    paths = _blocks(parts.model, shape) if chosen == "blocks" else _layers(subject)
    found: dict[str, Any] = {}

    def note(y: Array, path: str) -> Array:
        if path in paths:
            found[path] = jax.ShapeDtypeStruct(y.shape, y.dtype)
        return y

    images = jax.ShapeDtypeStruct((parts.length.batch_size, *shape), jnp.float32)
    jax.eval_shape(
        lambda v, x: _with_outputs(parts.model, v, x, train, note),
        parts.abstract_variables(),
        images,
    )
    for path in paths:
        if path not in found:
            raise UserError(f"place {path!r} has no output to take a gradient by; go by layers")
    return found


def _blocks(model: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """Returns the paths of the residual blocks; one of several branches is told once."""
    return list(dict.fromkeys(re.sub(r"/\d+$", "", name) for name in block_paths(model, shape)))


def _layers(subject: Subject) -> list[str]:
    """Returns the paths of the normalizers, or, if there is none, of the hidden linear layers."""
    norms = norm_layers(subject.parts.model, subject.parts.info.image_shape)
    linear = linear_paths(subject.parts.abstract_variables()["params"]) - {"head"}
    return [layer.path for layer in norms] or sorted(linear)


def _shifted(
    model: nn.Module, variables: Any, images: Array, train: bool, shifts: dict[str, Array]
) -> Array:
    """Returns the logits with an array added to the output of each module of `shifts`."""

    def shift(y: Array, path: str) -> Array:
        return y + shifts[path] if path in shifts else y

    return _with_outputs(model, variables, images, train, shift)


def _with_outputs(
    model: nn.Module, variables: Any, images: Array, train: bool, change: Any
) -> Array:
    """Returns the logits, each module's output y in its place changed to change(y, path)."""

    def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        y = call(*args, **kwargs)
        changes = context.method_name == "__call__" and isinstance(y, jax.Array)
        return change(y, "/".join(context.module.path)) if changes else y

    with nn.intercept_methods(watch):
        logits, _ = model.apply(variables, images, train=train, mutable=["batch_stats"])
    return logits


def _is_zero(kernel: Array | None) -> bool:
    return kernel is not None and not jnp.any(kernel)


def _growths(squares: list[float]) -> list[float | None]:
    return [*itertools.starmap(_ratio, itertools.pairwise(squares)), None]


def _ratio(a: float, b: float) -> float | None:
    """Returns a / b; None over zero, and nan over what is not finite, of which it says nothing."""
    if b == 0:
        return None
    return a / b if math.isfinite(b) else math.nan


def _geometric_mean(rows: list[list[float]]) -> float | None:
    """Returns the growth of one place, as a mean over places and seeds of its logarithm."""
    ends = [(row[0], row[-1]) for row in rows]
    places = len(rows[0]) - 1
    if places < 1 or not all(0 < end < math.inf for pair in ends for end in pair):
        return None
    logs = [math.log(first / last) / places for first, last in ends]
    return math.exp(math.fsum(logs) / len(logs))
