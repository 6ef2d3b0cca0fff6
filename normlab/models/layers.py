"""The normalizers of a model, layer by layer, found without computing anything."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from normlab.norms import NORMS


@dataclasses.dataclass(frozen=True)
class NormLayer:
    """One normalizer in a model."""

    path: str  # its place, e.g. stage1_block1/norm1
    kind: str  # config name
    shape: tuple[int, ...]  # of its input, without the batch
    note: str  # where it departs from what the config says; "" else


def measures(model: nn.Module, image_shape: tuple[int, ...]) -> list[str]:
    """Returns the names layer/measure of what the normalizers measure at each training step."""
    if not model.norm.measures:
        return []
    layers = norm_layers(model, image_shape)
    return [f"{layer.path}/{name}" for layer in layers for name in NORMS[layer.kind].measures]


def norm_layers(model: nn.Module, image_shape: tuple[int, ...]) -> list[NormLayer]:
    """Returns the normalizers in the order in which an image [H, W, C] meets them."""
    kinds: dict[type[nn.Module], str] = {cls: name for name, cls in NORMS.items()}
    found: dict[str, NormLayer] = {}  # a layer in a loop is called more than once

    def watch(
        call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        if type(module) in kinds and context.method_name == "__call__":
            shape = tuple(args[0].shape[1:])
            path = "/".join(module.path)
            found[path] = NormLayer(path, kinds[type(module)], shape, module.note(shape[-1]))
        return call(*args, **kwargs)

    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    with nn.intercept_methods(watch):
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    return list(found.values())
