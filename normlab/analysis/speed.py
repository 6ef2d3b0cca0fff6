"""How fast a normalizer is: time, bytes moved and memory, beside a plain copy of its input.

A normalizer does little arithmetic, so what bounds it is how often its tensor crosses the memory
bus. The least number of passes is known for a method (`least_passes`), and a copy is one read and
one write; so `share` is the fraction of the copy's bandwidth at which the method's least traffic
went: 1 is as fast as memory allows, and more means that a cache held what was counted as moved.

All contenders take turns, round by round, so that a slow stretch of the machine meets each of them;
quotients are of the fastest rounds. Compare them, and not the milliseconds.
"""

import dataclasses
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from normlab.analysis import pytorch
from normlab.errors import unknown
from normlab.norms import NORMS, Normalizer, join_state, split_state
from normlab.report.tables import NOTHING, Cell, Table
from normlab.training.memory import residual_bytes

Shape = tuple[int, ...]
Clock = Callable[[], float]

SHAPES: dict[str, Shape] = {
    "cifar_early": (128, 32, 32, 16),
    "cifar_late": (128, 8, 8, 64),
    "imagenet_early": (64, 56, 56, 256),
    "imagenet_late": (256, 14, 14, 1024),
    "tokens": (64, 197, 384),
}
"""Where normalizers stand: ResNet-20's first and last stage, ResNet-50's, a small transformer."""

CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Seconds that pass, or seconds of CPU in all threads, which other work lengthens less."""

_TURN = 0.02  # seconds that a turn of a fast contender is filled up to, so that the clock is fine
_MOST_CALLS = 20  # in a turn


@dataclasses.dataclass(frozen=True)
class Pace:
    """One direction of one contender at one shape: `forward`, or `forward + backward`.

    The machine may have other work, which only ever adds time. So quotients are of the fastest
    rounds, on both sides.
    """

    seconds: float  # median over rounds
    least_seconds: float  # of the fastest round
    passes: int | None  # least number of times that the tensor is read or written; None: not known
    bytes: int | None  # what these passes move
    share: float | None  # of the bandwidth of a plain copy
    torch_seconds: float | None = None  # PyTorch's fastest round, in the better memory layout
    torch_ratio: float | None = None  # normlab's time over PyTorch's: below 1 is faster


@dataclasses.dataclass(frozen=True)
class Row:
    """One normalizer, or the copy, at one shape."""

    norm: str  # config name, or "copy"
    fields: dict[str, Any]  # that differ from the class's defaults
    shape_name: str
    shape: Shape
    dtype: str
    forward: Pace
    both: Pace | None = None  # forward + backward; None for the copy
    temporary_bytes: int = 0  # XLA's plan for forward + backward, inputs and outputs not counted
    kept_bytes: int = 0  # what `jax.vjp` keeps for the backward pass, its inputs not counted

    def figures(self) -> dict[str, Any]:
        """Returns all of it as JSON has it."""
        return dataclasses.asdict(self)


def measure(
    names: Iterable[str],
    shape_name: str,
    shape: Shape,
    dtype: str,
    rounds: int,
    *,
    torch: bool = False,
    clock: str = "wall",
) -> list[Row]:
    """Returns a row a normalizer at one shape [N, ..., C], each timed in `rounds` rounds of turns.

    `torch`: time PyTorch's counterparts, too. `clock`: a name in `CLOCKS`.
    """
    x, dy = (_values(shape, dtype, seed) for seed in (0, 1))
    turns = {"copy": _timed(CLOCKS[clock], _compiled(jnp.copy, x), x)}
    layers = {name: _layer(name, shape, x, dy, CLOCKS[clock]) for name in names}
    for name, layer in layers.items():
        turns[f"{name} forward"] = layer.forward
        turns[f"{name} both"] = layer.both
        if torch:
            others = pytorch.counterparts(name, layer.fields, shape, dtype, CLOCKS[clock])
            for index, (forward, both) in enumerate(others):
                turns[f"{name} forward torch {index}"] = forward
                turns[f"{name} both torch {index}"] = both
    seconds = take_turns(turns, rounds)
    copy = _pace(seconds, "copy", 2, x.nbytes)
    rows = [Row("copy", {}, shape_name, shape, dtype, copy)]
    for name, layer in layers.items():
        ahead, back = layer.passes or (None, None)
        total = None if ahead is None or back is None else ahead + back
        rows.append(
            Row(
                name,
                layer.fields,
                shape_name,
                shape,
                dtype,
                _pace(seconds, f"{name} forward", ahead, x.nbytes),
                _pace(seconds, f"{name} both", total, x.nbytes),
                layer.temporary_bytes,
                layer.kept_bytes,
            )
        )
    return rows


def parse_shape(text: str) -> Shape:
    """Returns the shape of a name in `SHAPES`, or of sizes as in 8x4x4x16, channels last.

    Raises UserError for anything else.
    """
    if text in SHAPES:
        return SHAPES[text]
    sizes = re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", text)
    if not sizes:
        raise unknown("shape", text, SHAPES)
    return tuple(map(int, text.split("x")))


def table(rows: Sequence[Row]) -> Table:
    """Returns the rows of one shape as a table. MiB moved are those of the least passes."""
    with_torch = any(row.forward.torch_ratio is not None for row in rows)
    columns = ["normalizer"]
    for direction in ("forward", "with backward"):
        columns += [f"{direction} ms", "MiB moved", "of copy"]
        columns += ["× PyTorch"] * with_torch
    columns += ["temporary MiB", "kept MiB"]
    return Table(tuple(columns), tuple(_cells(row, with_torch) for row in rows))


def _cells(row: Row, with_torch: bool) -> tuple[Cell, ...]:
    name = " ".join([row.norm, *(f"{key}={value}" for key, value in row.fields.items())])
    texts = [name]
    for pace in (row.forward, row.both):
        found = (None,) * 4 if pace is None else _texts(pace)
        texts += [text or NOTHING for text in found[: 3 + with_torch]]
    sizes = () if row.both is None else (row.temporary_bytes, row.kept_bytes)
    texts += [f"{size / 2**20:.1f}" for size in sizes] or [NOTHING] * 2
    return tuple(map(Cell, texts))


def _texts(pace: Pace) -> tuple[str | None, ...]:
    return (
        f"{pace.seconds * 1e3:.2f}",
        None if pace.bytes is None else f"{pace.bytes / 2**20:.1f}",
        None if pace.share is None else f"{pace.share:.2f}",
        None if pace.torch_ratio is None else f"{pace.torch_ratio:.2f}",
    )


def least_passes(
    norm: str, shape: Shape, itemsize: int, fields: dict[str, Any], cache: int
) -> tuple[int, int] | None:
    """Returns how often a method must read or write a tensor [N, ..., C] forward and backward.

    `itemsize`: bytes of a value; `cache`: bytes that stay near a core between two passes. It is
    what the class says (`Facts.passes`), but where a group of an example does not fit in the cache
    it is read twice, as a batch is. None where the class says nothing.
    """
    facts = NORMS[norm].facts
    if facts.passes == (2, 3) and facts.over:
        in_group = _group_values(norm, shape, fields)
        return (2, 3) if in_group * itemsize <= cache else (3, 5)
    return facts.passes


def _group_values(norm: str, shape: Shape, fields: dict[str, Any]) -> int:
    """Returns how many values of x [N, ..., C] share a statistic, for one within an example."""
    module = make(norm, fields)
    if getattr(module, "axes", "all") == "channel":
        return shape[-1]
    positions = math.prod(shape[1:-1])
    if norm in ("instance_norm", "filter_response_norm"):
        return positions
    return positions * shape[-1] // getattr(module, "num_groups", 1)


def bench_fields(norm: str, shape: Shape) -> dict[str, Any]:
    """Returns the fields with which a normalizer is timed at a shape, where not by default.

    Tokens [N, T, C] are normalized over channels. Groups of channels are 32, or half as many as
    there are channels: a group of one is instance normalization.
    """
    names = {field.name for field in dataclasses.fields(NORMS[norm])}
    fields: dict[str, Any] = {}
    if "axes" in names and len(shape) == 3:
        fields["axes"] = "channel"
    default = getattr(NORMS[norm], "num_groups", 1)
    if default > 1:
        wish = min(default, max(shape[-1] // 2, 1))
        fields["num_groups"] = next(g for g in range(wish, 0, -1) if shape[-1] % g == 0)
    return {name: value for name, value in fields.items() if value != getattr(NORMS[norm], name)}


def make(norm: str, fields: dict[str, Any]) -> Normalizer:
    """Returns the normalizer of a config name with these fields."""
    return NORMS[norm](**fields)


def cache_bytes() -> int:
    """Returns the size of a core's own (second-level) cache; 1 MiB where Linux does not say."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text(encoding="ascii")
    except OSError:
        return 2**20
    found = re.fullmatch(r"(\d+)([KM])", text.strip())
    return int(found[1]) * {"K": 2**10, "M": 2**20}[found[2]] if found else 2**20


def take_turns(turns: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds a call of each contender, one number a round, all in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            turn()  # untimed: meanwhile others had the caches and the threads
            first = turn()
            calls = min(_MOST_CALLS, int(_TURN / first))
            # Their mean: the CPU's clock is late to count other threads, up to a call or two.
            seconds[name].append(statistics.mean([first, *(turn() for _ in range(calls - 1))]))
    return seconds


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A normalizer at one shape, compiled."""

    fields: dict[str, Any]
    passes: tuple[int, int] | None
    forward: Callable[[], float]
    both: Callable[[], float]
    temporary_bytes: int
    kept_bytes: int


def _layer(name: str, shape: Shape, x: jax.Array, dy: jax.Array, clock: Clock) -> _Layer:
    fields = bench_fields(name, shape)
    module = make(name, fields)
    variables = module.init(jax.random.key(0), x[:1], train=True)
    params = variables.get("params", {})
    backward_state, state = split_state(variables.get("batch_stats", {}))

    def apply(inputs: Any, state: Any) -> tuple[jax.Array, Any]:
        params, backward_state, x = inputs
        variables = {"params": params, "batch_stats": join_state(state, backward_state)}
        y, updated = module.apply(variables, x, train=True, mutable=["batch_stats"])
        return y, updated

    def both(inputs: Any, state: Any, dy: jax.Array) -> Any:
        y, pullback, updated = jax.vjp(lambda inputs: apply(inputs, state), inputs, has_aux=True)
        # As in a network, the gradient comes when the output is there: one pass cannot make both.
        y, dy = jax.lax.optimization_barrier((y, dy))
        return y, pullback(dy), updated

    inputs = (params, backward_state, x)
    run_forward, run_both = _compiled(apply, inputs, state), _compiled(both, inputs, state, dy)
    return _Layer(
        fields=fields,
        passes=least_passes(name, shape, x.dtype.itemsize, fields, cache_bytes()),
        forward=_timed(clock, run_forward, inputs, state),
        both=_timed(clock, run_both, inputs, state, dy),
        temporary_bytes=run_both.memory_analysis().temp_size_in_bytes,
        kept_bytes=residual_bytes(apply, inputs, state),
    )


def _pace(seconds: dict[str, list[float]], name: str, passes: int | None, nbytes: int) -> Pace:
    own = seconds[name]
    copy = min(seconds["copy"])
    layouts = [times for key, times in seconds.items() if key.startswith(f"{name} torch ")]
    torch = min(map(min, layouts), default=None)
    return Pace(
        seconds=statistics.median(own),
        least_seconds=min(own),
        passes=passes,
        bytes=None if passes is None else passes * nbytes,
        share=None if passes is None else copy / min(own) * passes / 2,
        torch_seconds=torch,
        torch_ratio=None if torch is None else min(own) / torch,
    )


def _values(shape: Shape, dtype: DTypeLike, seed: int) -> jax.Array:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(values, dtype)


def _compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    return jax.jit(function).lower(*arguments).compile()


def _timed(clock: Clock, function: Callable[..., Any], *arguments: Any) -> Callable[[], float]:
    """Returns a call that gives the seconds until the result of `function(*arguments)` is there."""

    def turn() -> float:
        begin = clock()
        jax.block_until_ready(function(*arguments))
        return clock() - begin

    return turn
