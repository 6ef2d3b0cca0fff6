"""Signal propagation plots. Brock, De & Smith 2021, arXiv:2101.08692, section 3.

Of each residual block: the mean over channels of the squared channel mean, the mean over channels
of the channel variance, both of the block's output, and the variance at the end of its residual
branch. A channel's mean and variance are over examples and positions. The branch's end is taken
before stochastic depth, skip gain and α (`models/signals.py`), as in the official code
(deepmind-research/nfnets, `signal_metrics`), and its squared mean is told, too.

A model without residual blocks has a place a linear layer, whose output is measured: what enters a
normalizer, or an activation.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax import Array

from normlab.analysis.mean_field import BlockSignal, Signal
from normlab.analysis.predictions import predicted_signals
from normlab.analysis.subject import Subject
from normlab.errors import UserError, unknown
from normlab.models.signals import SIGNALS
from normlab.report.profiles import Profile, first_not_finite
from normlab.training.probe import block_paths, channel_moments, shown_blocks

PLACES = ("blocks", "layers")


def measure_signals(
    subject: Subject, *, by: str | None = None, batch_statistics: bool = True
) -> Profile:
    """Returns mean_squared, variance, branch_mean_squared and branch_variance of each block.

    `by` "layers": mean_squared and variance of each linear layer's output; None: blocks if the
    model has any. `batch_statistics`: normalized as in training, else by running statistics, which
    are 0 and 1 at the start. Raises UserError for blocks of a model without.
    """
    chosen = place_kind(subject, by)
    measure = watch_blocks if chosen == "blocks" else watch_layers
    names: list[str] = []

    @jax.jit
    def moments(variables: Any, images: Array) -> list[Array]:
        found = measure(subject.parts.model, variables, images, train=batch_statistics)
        names[:] = list(found)  # known once this is traced, in the order of the layers
        return [
            jnp.stack([m for y in arrays for m in channel_moments(y)]) for arrays in found.values()
        ]

    seeds, rows = [], []
    for draw in subject.draws():
        found = moments(draw.variables, draw.images)
        seeds.append(draw.seed)
        rows.append([[float(number) for number in place] for place in jax.device_get(found)])
    expected = (
        predicted_signals(subject, names) if batch_statistics and chosen == "blocks" else None
    )
    columns = ["mean_squared", "variance", "branch_mean_squared", "branch_variance"]
    width = len(rows[0][0])
    exploded = first_not_finite(names, [[sum(place) for place in seed] for seed in rows])
    return Profile(
        probe="signals",
        title=f"Signals by depth: {subject.parts.config.model.kind}",
        subject=describe(subject)
        | {"places": chosen, "statistics": "batch" if batch_statistics else "running"},
        places=tuple(names),
        seeds=tuple(seeds),
        values={
            name: [[place[i] for place in seed] for seed in rows]
            for i, name in enumerate(columns[:width])
        },
        predicted=_columns(expected),
        drawn=tuple(name for name in columns[:width] if name != "branch_mean_squared"),
        xlabel=f"{chosen.removesuffix('s')}, from the input on",
        ylabel="mean over channels",
        summary={} if exploded is None else {"not finite": f"from {exploded} on"},
    )


def _columns(blocks: list[BlockSignal] | None) -> dict[str, list[float | None]]:
    found: dict[str, list[float | None]] = {}
    for prefix, part in (("", "stream"), ("branch_", "branch")):
        for name in Signal._fields:
            found[prefix + name] = [getattr(getattr(block, part), name) for block in blocks or ()]
    return found if blocks else {}


def place_kind(subject: Subject, by: str | None) -> str:
    """Returns the kind of places that a probe goes by: blocks where the model has any."""
    if by is not None and by not in PLACES:
        raise unknown("kind of place", by, PLACES)
    has_blocks = bool(block_paths(subject.parts.model, subject.parts.info.image_shape))
    if by == "blocks" and not has_blocks:
        kind = subject.parts.config.model.kind
        raise UserError(f"model {kind!r} has no residual blocks; go by layers")
    return by or ("blocks" if has_blocks else "layers")


def watch_blocks(
    model: nn.Module, variables: Any, images: Array, *, train: bool
) -> Mapping[str, tuple[Array, ...]]:
    """Returns {block: (its output, the end of its branch)}, as `shown_blocks`."""
    return shown_blocks(_apply(model, variables, images, train, [SIGNALS]).get(SIGNALS, {}))


def watch_layers(
    model: nn.Module, variables: Any, images: Array, *, train: bool
) -> dict[str, tuple[Array, ...]]:
    """Returns {linear layer: (its output,)}, of all layers that have a kernel."""
    paths = linear_paths(variables["params"])

    def is_linear(module: nn.Module, method: str) -> bool:
        return method == "__call__" and "/".join(module.path) in paths

    sown = _apply(model, variables, images, train, ["intermediates"], is_linear)
    flat = flatten_dict(sown.get("intermediates", {}), sep="/")
    return {name.removesuffix("/__call__"): outputs[:1] for name, outputs in flat.items()}


def linear_paths(params: Any) -> set[str]:
    """Returns the paths of the modules that hold a kernel."""
    names = flatten_dict(params, sep="/")
    return {name.removesuffix("/kernel") for name in names if name.endswith("/kernel")}


def _apply(
    model: nn.Module,
    variables: Any,
    images: Array,
    train: bool,
    collections: list[str],
    capture: Callable[[nn.Module, str], bool] | bool = False,
) -> dict[str, Any]:
    _, sown = model.apply(
        variables,
        images,
        train=train,
        mutable=[*collections, "batch_stats"],
        capture_intermediates=capture,
    )
    return dict(sown)


def describe(subject: Subject) -> dict[str, Any]:
    """Returns what was probed, for the record."""
    config = subject.parts.config
    return {
        **subject.origin,
        "model": config.model.kind,
        "norm": config.norm.kind,
        "conv": config.conv.kind,
        "activation": config.model.activation,
        "input": subject.inputs,
        "batch_size": subject.parts.length.batch_size,
    }
