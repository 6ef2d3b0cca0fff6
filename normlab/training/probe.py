"""What a run measures of itself beside its metrics.

One unit, at each evaluation (`probe.layer`): percentiles of a normalizer's output, which is the
input of the activation behind it, over the test set. Ioffe & Szegedy 2015 (arXiv:1502.03167),
figure 1 (b, c). Measured as the network would be used, with running statistics; the paper does not
say on which images its percentiles are. Of a normalizer that takes the activation's place (EvoNorm,
filter response and proxy normalization) they are behind the activation.

Whole layers, at the start and at each log event (`probe.layers`, `probe.signals`): the batch of the
last step, at the start of the first, goes forward once more, at the weights behind that step and
normalized by its own statistics.
"""

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from normlab.data import (
    DatasetInfo,
    Examples,
    eval_indices,
    fetch,
    train_indices,
    training_batch,
)
from normlab.errors import UserError, unknown
from normlab.models.layers import norm_layers
from normlab.models.signals import SIGNALS
from normlab.norms.functional import Moments
from normlab.training.examples import Feed
from normlab.training.parallel import Compiler, make_mesh, seed_array, shard_rows, splittable

SAMPLE = 4096
"""Values of a layer, at most, whose percentiles are logged: one and the same random choice."""


def check_probe(config: ConfigDict, model: nn.Module, info: DatasetInfo) -> None:
    """Raises UserError for a layer, a unit or blocks that the model does not have."""
    wanted = config.probe
    if wanted.signals and not block_paths(model, info.image_shape):
        raise UserError(
            f"config field 'probe.signals' = True, but model {config.model.kind!r} has no "
            "residual blocks"
        )
    if wanted.layer is None and not wanted.layers:
        return
    channels = {x.path: x.shape[-1] for x in norm_layers(model, info.image_shape)}
    for pattern in wanted.layers:
        if not any(fnmatchcase(path, pattern) for path in channels):
            raise unknown("normalizer in 'probe.layers'", pattern, channels)
    if wanted.layer is not None:
        if wanted.layer not in channels:
            raise unknown("'probe.layer'", wanted.layer, channels)
        units = channels[wanted.layer]
        if not 0 <= wanted.unit < units:
            raise UserError(
                f"config field 'probe.unit' = {wanted.unit} must be from 0 to {units - 1}"
            )
    for percentile in config.probe.percentiles:
        if not 0 <= percentile <= 100:
            raise UserError(
                f"config field 'probe.percentiles' has {percentile}; it must be from 0 to 100"
            )


def unit_percentiles(
    config: ConfigDict,
    model: nn.Module,
    info: DatasetInfo,
    compiler: Compiler,
    variables: dict[str, Any],
    examples: Feed,
) -> dict[str, float]:
    """Returns {"p15": value, ...} of the unit `config.probe` names, over all examples."""
    layer, unit = config.probe.layer, config.probe.unit

    def outputs(variables: dict[str, Any], data: Examples, rows: Array) -> Array:
        images, _ = fetch(data, rows, info)
        _, sown = model.apply(
            variables,
            images,
            train=False,
            capture_intermediates=lambda module, _: "/".join(module.path) == layer,
            mutable=["intermediates"],
        )
        [y] = jax.tree.leaves(sown["intermediates"])
        return y[..., unit]

    found = []
    size = splittable(min(config.eval.batch_size, len(examples)), make_mesh(config))
    indices, masks = eval_indices(len(examples), size)
    for (data, rows), mask in zip(examples.batches(indices), masks, strict=True):
        arguments = (variables, data, jax.numpy.asarray(rows))
        values = np.asarray(compiler("probe", outputs, *arguments)(*arguments), np.float64)
        found.append(values[mask].ravel())
    values = np.concatenate(found)
    percentiles = config.probe.percentiles
    return {f"p{p:g}": float(np.percentile(values, p)) for p in percentiles}


def layer_metrics(
    config: ConfigDict,
    model: nn.Module,
    info: DatasetInfo,
    compiler: Compiler,
    mesh: Mesh,
    variables: dict[str, Any],
    step: int,
    examples: Feed,
) -> dict[str, float]:
    """Returns {layer/measure: value} of the training batch of `step` (from 0).

    Of each normalizer that `probe.layers` names: `p15`, ... (`probe.percentiles`) of its output's
    values, and, where it keeps a running mean or variance, `mean_gap` and `variance_gap` (`gaps`).
    With `probe.signals`, of each residual block: `mean_squared`, `variance`, `branch_variance`.
    """
    patterns = config.probe.layers

    def measure(variables: Any, data: Examples, seed: Array, step: Array, rows: Array) -> Any:
        paths = {layer.path for layer in norm_layers(model, info.image_shape)} if patterns else {}
        watched = {x for x in paths if any(fnmatchcase(x, pattern) for pattern in patterns)}

        def is_watched(module: nn.Module, method: str) -> bool:
            return method == "__call__" and "/".join(module.path) in watched

        rows = shard_rows(rows, mesh)
        images, _ = training_batch(data, config.data, info, seed, step, rows)
        collections = ["batch_stats"]
        collections += ["intermediates", "batch_moments"] if watched else []
        collections += [SIGNALS] if config.probe.signals else []
        _, sown = model.apply(
            variables,
            shard_rows(images, mesh),
            train=True,
            mutable=collections,
            capture_intermediates=is_watched if watched else False,
        )
        gaps_and_signals = _gaps(model, variables, sown.get("batch_moments", {}), watched)
        gaps_and_signals |= _signals(sown.get(SIGNALS, {}))
        return gaps_and_signals, _samples(sown.get("intermediates", {}))

    size = config.train.batch_size
    indices = train_indices(config.seed, step, 1, size, len(examples))
    [(data, rows)] = examples.steps(config.seed, step, indices, 1)
    place = jnp.asarray(step, jnp.int32)
    arguments = (variables, data, seed_array(config.seed), place, jnp.asarray(rows[0]))
    numbers, samples = jax.device_get(compiler("layers", measure, *arguments)(*arguments))
    found = {name: float(value) for name, value in numbers.items()}
    for layer, values in samples.items():  # numpy selects, where XLA's CPU backend would sort
        measured = np.percentile(values.astype(np.float64), config.probe.percentiles)
        named = zip(config.probe.percentiles, measured, strict=True)
        found |= {f"{layer}/p{p:g}": float(value) for p, value in named}
    return found


def _samples(captured: Mapping[str, Any]) -> dict[str, Array]:
    """Returns up to SAMPLE values of each layer's output: float32."""
    found = {}
    for name, outputs in flatten_dict(dict(captured), sep="/").items():
        values = jnp.concatenate([y.ravel() for y in outputs]).astype(jnp.float32)
        if values.size > SAMPLE:
            # Not every k-th: where k and the channels have a common factor, only some are seen.
            values = values[np.random.default_rng(0).integers(values.size, size=SAMPLE)]
        found[name.removesuffix("/__call__")] = values
    return found


def _gaps(
    model: nn.Module, variables: Any, sown: Mapping[str, Any], watched: Collection[str]
) -> dict[str, Array]:
    running = flatten_dict(variables.get("batch_stats", {}))
    found: dict[str, Array] = {}
    for (*path, _), moments in flatten_dict(dict(sown)).items():
        layer = "/".join(path)
        if layer in watched:
            kept = {name: running[(*path, name)] for name in _RUNNING if (*path, name) in running}
            epsilon = model.norm.at(layer).fields.get("epsilon", 1e-5)
            measured = gaps(moments, kept, epsilon)
            found |= {f"{layer}/{name}": value for name, value in measured.items()}
    return found


_RUNNING = ("mean", "var", "sigma")


def gaps(moments: Moments, running: Mapping[str, Array], epsilon: float) -> dict[str, Array]:
    """Returns how a batch lies to the running statistics that stand in for its own at inference.

    The batch, normalized by them, has mean (μ_B − μ)/√(σ² + ε) and variance
    (σ²_B + ε)/(σ² + ε) in a channel, 0 and 1 if they were its own: `mean_gap` is the mean over
    channels of the former's size, `variance_gap` that of the latter's logarithm, above 0 where the
    running variance is too small. `moments`, and `running` by the names of the state (mean; var, or
    sigma = √(σ² + ε)): [..., C]. Where no variance runs, the batch's own divides.
    """
    found = {}
    of_batch = moments.var + epsilon
    scale = of_batch
    if "var" in running:
        scale = running["var"] + epsilon
    elif "sigma" in running:
        scale = jnp.square(running["sigma"])
    if scale.shape != of_batch.shape:  # statistics of their own kind, as of groups
        return {}
    if "mean" in running:
        shift = moments.mean - running["mean"]
        found["mean_gap"] = jnp.mean(jnp.abs(shift) / jnp.sqrt(scale))
    if scale is not of_batch:
        found["variance_gap"] = jnp.mean(jnp.log(of_batch / scale))
    return found


# Residual blocks ---------------------------------------------------------------------------------


def block_paths(model: nn.Module, image_shape: tuple[int, ...]) -> list[str]:
    """Returns the residual blocks that show signals, in their order; computes nothing."""
    names: list[str] = []

    def watch(key: Array, images: Array) -> None:
        variables = model.init(key, images, train=False)
        _, sown = model.apply(variables, images, train=True, mutable=[SIGNALS, "batch_stats"])
        names.extend(shown_blocks(sown.get(SIGNALS, {})))

    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    jax.eval_shape(watch, jax.eval_shape(lambda: jax.random.key(0)), images)
    return names


def shown_blocks(sown: Mapping[str, Any]) -> dict[str, tuple[Array, Array]]:
    """Returns {block: (its output, the end of its branch)} of what blocks sowed.

    block/1, block/2 if one of them has several branches, as a transformer's has.
    """
    flat = flatten_dict(dict(sown), sep="/")
    found = {}
    for name, streams in flat.items():
        path, _, what = name.rpartition("/")
        if what == "stream":
            for i, pair in enumerate(zip(streams, flat[f"{path}/branch"], strict=True), 1):
                found[path if len(streams) == 1 else f"{path}/{i}"] = pair
    return found


def channel_moments(y: Array) -> tuple[Array, Array]:
    """Returns the means over channels of the squared mean and of the variance: y [N, ..., C]."""
    y = y.astype(jnp.promote_types(y.dtype, jnp.float32)).reshape(-1, y.shape[-1])
    return jnp.mean(jnp.square(y.mean(0))), jnp.mean(y.var(0))


def _signals(sown: Mapping[str, Any]) -> dict[str, Array]:
    found = {}
    for block, (stream, branch) in shown_blocks(sown).items():
        mean_squared, variance = channel_moments(stream)
        found[f"{block}/mean_squared"] = mean_squared
        found[f"{block}/variance"] = variance
        found[f"{block}/branch_variance"] = channel_moments(branch)[1]
    return found
