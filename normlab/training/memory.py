"""What a training step needs of a device's memory, from shapes: nothing is computed.

The activations are what the backward pass is given: the outputs of `jax.vjp`'s forward pass that
are none of its inputs, each once.

The peak over what XLA plans for the step (`compiled.memory_analysis()`, test set apart; CPU,
float32, jaxlib 0.10.2): digits' cnn 1.36, with LayerNorm 1.42; ResNet-20 at batch 128 1.17, and
without a normalizer, whose steps by element XLA fuses, 0.96; ResNet-50 at 8 images of 224×224 1.04.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from normlab.training import parallel
from normlab.training.setup import Parts
from normlab.training.state import initial_state
from normlab.training.step import make_loss

LEFT_OUT = (
    "From shapes alone: XLA fuses and reuses buffers, so the truth is usually lower; "
    "the workspace of its kernels, and evaluation, are not counted."
)


def estimate(parts: Parts) -> dict[str, int]:
    """Returns {what: bytes} that a step of training holds on one device; "peak" is their sum.

    State and data set lie whole on every device, the batch and its activations in shares. The
    state is donated to the step, so it counts once.
    """
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    state = jax.eval_shape(functools.partial(initial_state, parts), seed)
    size, info = parts.length.batch_size, parts.info
    images = jax.ShapeDtypeStruct((size, *info.image_shape), jnp.float32)
    labels, key = jax.ShapeDtypeStruct((size,), jnp.int32), jax.eval_shape(jax.random.key, 0)
    batch = images, labels, key
    loss = make_loss(parts.model, parts.config.train.label_smoothing)
    activations = residual_bytes(loss, state.params, state.batch_stats, batch)
    devices = parallel.num_devices(parts.config)
    # uint8 images and int32 labels, as data/ has them.
    example = math.prod(info.image_shape) + np.dtype(np.int32).itemsize
    found = {
        "parameters": tree_bytes(state.params),
        "gradients": tree_bytes(state.params),
        "optimizer state": tree_bytes(state.opt_state),
        "batch statistics": tree_bytes(state.batch_stats),
        "moving averages": tree_bytes(state.ema),
        # What is decoded batch by batch is there as long as its step.
        "data set": example * (info.num_train + info.num_test if info.one_size else size),
        "batch": tree_bytes((images, labels)) // devices,
        "activations": activations // devices,
    }
    if parts.config.optim.sam_rho is not None:
        found["ascended parameters"] = tree_bytes(state.params)
    return found | {"peak": sum(found.values())}


class HighWaterMark:
    """The most memory that a run has needed since it began, of this process or of its devices.

    On a CPU that is all of the process (`VmHWM` of Linux, which is set back at the start); of an
    accelerator what its allocator says, which is since the process began.
    """

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int | None:
        """Returns the largest of the devices' marks; None where nobody knows it."""
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        marks = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
        if marks:
            return max(marks)
        with contextlib.suppress(OSError):
            text = Path("/proc/self/status").read_text(encoding="utf-8")
            found = re.search(r"^VmHWM:\s*(\d+) kB$", text, flags=re.MULTILINE)
            if found:
                return 1024 * int(found[1])
        return None


def residual_bytes(loss: Callable[..., Any], params: Any, *arguments: Any) -> int:
    """Returns the bytes that the backward pass of `loss(params, *arguments)` keeps of the forward.

    `loss` returns (value, auxiliary). What it is given (a kernel, say) is not counted again.
    """

    def forward(params: Any, *arguments: Any) -> list[Any]:
        _, backward, _ = jax.vjp(lambda params: loss(params, *arguments), params, has_aux=True)
        return jax.tree.leaves(backward)

    jaxpr = jax.make_jaxpr(forward)(params, *arguments).jaxpr
    kept = {x for x in jaxpr.outvars if isinstance(x, core.Var)}  # the others are constants
    return sum(_bytes(x.aval) for x in kept - {*jaxpr.invars, *jaxpr.constvars})


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of a tree of arrays, or of their shapes."""
    return sum(map(_bytes, jax.tree.leaves(tree)))


def _bytes(array: Any) -> int:
    return math.prod(array.shape) * array.dtype.itemsize
