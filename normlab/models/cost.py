"""What a model costs, from its jaxpr: nothing is computed.

A multiply-accumulate (MAC) is counted where two arrays are contracted: convolutions and products of
matrices, for one image, without normalizers, activations and biases, as papers count them. (He et
al. 2016, table 1, give 3.8·10⁹ for ResNet-50 of version 1; version 1.5 has 4.09·10⁹.)
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend import core

from normlab.norms import Normalizer


def macs(model: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Returns the multiply-accumulates of one image [H, W, C] in evaluation."""
    variables, images, apply = _abstract(model, image_shape)
    with nn.intercept_methods(_mark_normalizers):
        jaxpr = jax.make_jaxpr(apply)(variables, images).jaxpr
    return sum(times * _macs_of(equation) for equation, times in _equations(jaxpr))


_MARK = "of_a_normalizer"


def _mark_normalizers(
    call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    """Puts the equations of a normalizer under a name of their own."""
    if not isinstance(context.module, Normalizer):
        return call(*args, **kwargs)
    with jax.named_scope(_MARK):
        return call(*args, **kwargs)


def xla_flops(model: nn.Module, image_shape: tuple[int, ...]) -> float | None:
    """Returns XLA's own count of floating-point operations for the same, before compilation.

    None if XLA gives none. It counts additions and multiplications apart, and all operations, but
    those of a loop once, however often it runs.
    """
    variables, images, apply = _abstract(model, image_shape)
    cost: Any = jax.jit(apply).lower(variables, images).cost_analysis()
    return None if not cost else cost.get("flops")


def _abstract(model: nn.Module, image_shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(lambda k, x: model.init(k, x, train=False), key, images)
    return variables, images, lambda variables, x: model.apply(variables, x, train=False)


def _equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Yields the equations of a jaxpr and of all it calls, and how often each is run.

    Those of normalizers are left out.
    """
    for equation in jaxpr.eqns:
        if _MARK in str(equation.source_info.name_stack):
            continue
        yield equation, times
        runs = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for value in equation.params.values():
            if isinstance(value, core.ClosedJaxpr):
                yield from _equations(value.jaxpr, runs)
            elif isinstance(value, core.Jaxpr):
                yield from _equations(value, runs)


def _macs_of(equation: Any) -> int:
    shapes = [variable.aval.shape for variable in equation.invars[:2]]
    if equation.primitive.name == "conv_general_dilated":
        [out] = (variable.aval.shape for variable in equation.outvars)
        # The kernel's input channels are those of one group.
        features = shapes[1][equation.params["dimension_numbers"].rhs_spec[0]]
        return math.prod(out) * math.prod(shapes[1]) // features
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        [out] = (variable.aval.shape for variable in equation.outvars)
        return math.prod(out) * math.prod(shapes[0][axis] for axis in contracted)
    return 0
