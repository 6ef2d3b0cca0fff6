"""Folding: a normalizer that is fixed at inference, merged into the linear layer before it.

Ioffe & Szegedy 2015 (arXiv:1502.03167), algorithm 2, line 11: with fixed statistics y = a·x + c for
each channel, so that a·(W∗u + b) + c = (a·W)∗u + (a·b + c): a layer with other weights, no
normalizer. It holds where the normalizer takes a linear layer's output as it is, and nothing else
takes it; in pre-activation networks an activation stands between, and they are refused.

Which layer stands before which normalizer is read off the model's jaxpr, and a and c off the
normalizer itself, so nothing here knows a model's or a normalizer's name. Weights that are a
function of parameters (`config.conv`) become plain ones on the way.
"""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.core import FrozenDict, unfreeze
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from normlab.data import DATASETS
from normlab.errors import UserError
from normlab.models.conv import StandardConv
from normlab.models.weight_space import WeightSpaceLayer, weights_of
from normlab.norms import Identity, Normalizer, NormFactory
from normlab.training import parallel
from normlab.training.restore import open_run

Variables = dict[str, Any]
Place = tuple[str, ...]

_PASSES = 5
_LINEAR = (nn.Conv, nn.Dense, WeightSpaceLayer)
_MAGNITUDES = (1e-2, 1.0, 1e2, 1e4, 1e6)  # what is clamped or squashed shows where values are large


@dataclasses.dataclass(frozen=True)
class _Placed:
    """A normalizer of a model, unbound, and where it stands."""

    norm: Normalizer
    path: Place
    shape: tuple[int, ...]  # of its input, for a batch of two


def without_norm(model: Any) -> Any:
    """Returns the model that folded variables belong to: plain layers, no normalizer."""
    plain = StandardConv(model.conv.filter_gradient, model.conv.boundary)
    return model.clone(norm=NormFactory(Identity, FrozenDict()), conv=plain)


def fold(model: Any, variables: Variables, image_shape: tuple[int, ...] | None = None) -> Variables:
    """Returns the variables of `without_norm(model)` with which it computes what `model` does.

    `image_shape`: [H, W, C] of the model's input, to trace it; None: that of the first known data
    set that the parameters fit. Raises UserError, one line, for a normalizer that is not fixed at
    inference, or does not follow a linear layer directly.
    """
    variables = {name: unfreeze(tree) for name, tree in variables.items()}
    shape = image_shape or _known_shape(model, variables)
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    linear, followed = _layers(model, variables, images)
    folded: dict[Place, Array] = {}
    for path, layer in linear.items():
        params = _at(variables["params"], path)
        kernel, bias = weights_of(layer, params), params.get("bias", 0.0)
        if path in followed:
            slope, offset = _affine(followed[path], variables)
            kernel, bias = kernel * slope, bias * slope + offset
        folded[(*path, "kernel")] = kernel
        folded[(*path, "bias")] = jnp.broadcast_to(jnp.asarray(bias), kernel.shape[-1:])
    wanted = jax.eval_shape(
        lambda x: without_norm(model).init(jax.random.key(0), x, train=False), images
    )
    form = traverse_util.flatten_dict(wanted["params"])
    # What is no linear layer's and no normalizer's, e.g. an embedding, stays.
    others = traverse_util.flatten_dict(variables["params"])
    params = {name: folded.get(name, others.get(name)) for name in form}
    return {
        "params": traverse_util.unflatten_dict(
            {name: jnp.asarray(array, form[name].dtype) for name, array in params.items()}
        )
    }


def evaluate_folded(folder: Path, **settings: Any) -> dict[str, Any]:
    """Returns test metrics of a run's checkpoint, of the model as it is and of the folded one.

    Seconds are those of a pass over the test set, the best of five taken in turn, compiled before.
    `settings` as of `restore.open_run`; raises UserError as it and `fold` do.
    """
    there = open_run(folder, **settings)
    parts, evaluator = there.parts, there.evaluator
    folded = fold(parts.model, there.variables, parts.info.image_shape)
    other = dataclasses.replace(
        evaluator, model=without_norm(parts.model), compiler=parallel.Compiler()
    )
    ways = {
        "plain": (evaluator, there.variables),
        "folded": (other, parallel.replicate(folded, evaluator.mesh)),
    }
    test, size = there.data.evaluated["test"], parts.config.eval.batch_size
    metrics: dict[str, Any] = {"step": there.step}
    for name, (made, variables) in ways.items():
        found = made.running(variables, test, size)
        metrics |= {f"test_{metric}_{name}": value for metric, value in found.items()}
    seconds: dict[str, float] = dict.fromkeys(ways, math.inf)
    for _ in range(_PASSES):
        for name, (made, variables) in ways.items():
            start = time.perf_counter()
            made.running(variables, test, size)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    metrics |= {f"seconds_{name}": value for name, value in seconds.items()}
    return metrics | {"speed_up": seconds["plain"] / seconds["folded"]}


def _layers(
    model: Any, variables: Variables, images: Any
) -> tuple[dict[Place, nn.Module], dict[Place, _Placed]]:
    """Returns the linear layers, and the normalizers by the path of the layer that they follow."""
    linear: dict[Place, nn.Module] = {}
    norms: dict[str, _Placed] = {}

    def mark(
        call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(module, _LINEAR):
            linear[module.path] = module.clone(parent=None, name=None)
            return checkpoint_name(call(*args, **kwargs), f"linear:{'/'.join(module.path)}")
        if isinstance(module, Normalizer) and not isinstance(module, Identity):
            name = f"norm:{'/'.join(module.path)}"
            alone = module.clone(parent=None, name=None)
            norms[name] = _Placed(alone, module.path, args[0].shape)
            return call(checkpoint_name(args[0], name), *args[1:], **kwargs)
        return call(*args, **kwargs)

    with nn.intercept_methods(mark):
        traced = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, images)
    uses = Counter(id(v) for equation in traced.jaxpr.eqns for v in equation.invars)
    uses.update(id(v) for v in traced.jaxpr.outvars)
    marks = (e.params["name"] for e in traced.jaxpr.eqns if e.primitive.name == "name")
    calls = Counter(marks)
    source: dict[int, str] = {}
    followed: dict[Place, _Placed] = {}
    for equation in traced.jaxpr.eqns:
        if equation.primitive.name != "name":
            continue
        name, [given] = equation.params["name"], equation.invars
        if calls[name] > 1:
            raise UserError(f"cannot fold a model that calls {name.partition(':')[2]!r} twice")
        if name.startswith("linear:"):
            source[id(equation.outvars[0])] = name.removeprefix("linear:")
            continue
        layer = source.get(id(given))
        if layer is None or uses[id(given)] != 1:
            raise UserError(
                f"cannot fold the normalizer {name.removeprefix('norm:')!r}: it does not follow "
                "a convolution or dense layer directly, or is not alone in doing so"
            )
        followed[tuple(layer.split("/"))] = norms.pop(name)
    for placed in norms.values():
        raise UserError(
            f"cannot fold the normalizer {'/'.join(placed.path)!r}: it is part of a loop, and has "
            "no fixed layer before it"
        )
    return linear, followed


def _affine(placed: _Placed, variables: Variables) -> tuple[Array, Array]:
    """Returns (slope, offset) [C] of a normalizer at inference: y = slope·x + offset.

    Raises UserError if it is no such function. Both are what the module itself computes: the slope
    is its derivative, not a difference, and keeps its digits.
    """
    norm, path, shape = placed.norm, placed.path, placed.shape
    own = {name: _at(tree, path) for name, tree in variables.items() if _has(tree, path)}
    refused = f"cannot fold the normalizer {'/'.join(path)!r}: {type(norm).__name__} is"
    if norm.replaces_activation and norm.activation is not None:
        raise UserError(f"{refused} the activation, too")

    def apply(x: Array) -> Any:
        # In float32, whatever the network computes in.
        return norm.clone(dtype=None).apply(own, x, train=False)

    zero = jnp.zeros(shape)
    values = jax.jvp(apply, (zero,), (jnp.ones_like(zero),))
    offset, slope = (value.reshape(-1, shape[-1])[0] for value in values)
    for magnitude in _MAGNITUDES:
        probe = magnitude * jax.random.normal(jax.random.key(0), shape)
        limit = 1e-4 * (jnp.abs(probe * slope) + jnp.abs(offset)) + 1e-6
        if not bool(jnp.all(jnp.abs(apply(probe) - (probe * slope + offset)) <= limit)):
            raise UserError(f"{refused} not a fixed scale and shift of each channel at inference")
    return slope, offset


def _known_shape(model: Any, variables: Variables) -> tuple[int, ...]:
    """Returns the image shape of the first known data set that the parameters fit."""
    for shape in dict.fromkeys(info.image_shape for info in DATASETS.values()):
        images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
        try:
            jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, images)
        except Exception:  # of any kind: a shape that does not fit fails somewhere
            continue
        return shape
    raise UserError("the parameters fit the images of no known data set; give image_shape")


def _at(tree: Any, path: Place) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _has(tree: Any, path: Place) -> bool:
    for name in path:
        if name not in tree:
            return False
        tree = tree[name]
    return True
