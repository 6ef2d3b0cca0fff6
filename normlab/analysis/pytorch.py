"""PyTorch's counterparts of normalizers, timed beside them. Imports torch only when called."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from normlab.environment import threads
from normlab.errors import UserError

Turn = Callable[[], float]

COUNTERPARTS = ("batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm")


def require() -> str:
    """Gives PyTorch as many threads as XLA has; returns its version. UserError if it is absent."""
    try:
        import torch
    except ImportError:
        raise UserError("--against=torch needs PyTorch: pip install torch") from None
    torch.set_num_threads(threads())
    return str(torch.__version__)


def counterparts(
    norm: str, fields: dict[str, Any], shape: tuple[int, ...], dtype: str, clock: Turn
) -> list[tuple[Turn, Turn]]:
    """Returns (forward, forward and backward) for each memory layout; none if PyTorch lacks it.

    A turn makes one call and returns its seconds by `clock`. Shapes are [N, ..., C] as in normlab;
    in memory the channels come last or first.
    """
    if norm not in COUNTERPARTS:
        return []
    return [_turns(norm, fields, shape, dtype, clock, last) for last in (True, False)]


def _turns(
    norm: str,
    fields: dict[str, Any],
    shape: tuple[int, ...],
    dtype: str,
    clock: Turn,
    channels_last: bool,
) -> tuple[Turn, Turn]:
    import torch

    x, dy = _tensors(shape, dtype, channels_last)
    weight = torch.ones(shape[-1], requires_grad=True)
    bias = torch.zeros(shape[-1], requires_grad=True)
    function = _function(norm, fields, shape, weight, bias)

    def forward() -> float:
        begin = clock()
        with torch.no_grad():
            function(x)
        return clock() - begin

    leaf = x.detach().requires_grad_()
    inputs = [leaf, weight, *([] if norm == "rms_norm" else [bias])]

    def both() -> float:
        begin = clock()
        y = function(leaf)
        gradient = torch.autograd.grad(y, inputs, dy)
        seconds = clock() - begin
        del y, gradient
        return seconds

    return forward, both


@functools.lru_cache(maxsize=2)  # the two layouts of one shape
def _tensors(shape: tuple[int, ...], dtype: str, channels_last: bool) -> tuple[Any, Any]:
    """Returns x and dy [N, C, ...]; the channels are the last or the first in memory."""
    import torch

    made = []
    for seed in (0, 1):
        values = np.random.default_rng(seed).standard_normal(shape, np.float32)
        tensor = torch.from_numpy(values).to(getattr(torch, dtype)).movedim(-1, 1)
        made.append(tensor if channels_last else tensor.contiguous())
    return made[0], made[1]


def _function(
    norm: str, fields: dict[str, Any], shape: tuple[int, ...], weight: Any, bias: Any
) -> Callable[[Any], Any]:
    """Returns the function of x [N, C, ...] that does what a normalizer with these fields does."""
    import torch
    from torch.nn import functional

    channels = shape[-1]
    over_channels = fields.get("axes") == "channel"
    per_channel = (channels, *[1] * (len(shape) - 2))
    if norm == "batch_norm":
        mean, var = torch.zeros(channels), torch.ones(channels)
        return lambda x: functional.batch_norm(x, mean, var, weight, bias, training=True)
    if norm == "instance_norm":
        return lambda x: functional.instance_norm(x, weight=weight, bias=bias)
    if norm == "group_norm":
        groups = fields.get("num_groups", 32)
        return lambda x: functional.group_norm(x, groups, weight, bias)
    if norm == "layer_norm" and not over_channels:
        return lambda x: functional.group_norm(x, 1, weight, bias)
    if norm == "layer_norm":
        return lambda x: functional.layer_norm(x.movedim(1, -1), (channels,), weight, bias).movedim(
            -1, 1
        )
    if over_channels:
        return lambda x: functional.rms_norm(x.movedim(1, -1), (channels,), weight, 1e-5).movedim(
            -1, 1
        )
    return lambda x: functional.rms_norm(x, list(x.shape[1:]), eps=1e-5) * weight.view(per_channel)
