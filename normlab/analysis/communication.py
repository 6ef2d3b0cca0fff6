"""What devices tell each other in a step of training: counted from the program, nothing is run.

A replica of the step (`parallel.mode` pmap) is traced with an axis of any number of devices, and
its collectives are followed through the jaxpr. What depends on no input, as the count of a batch
without padding, is left out: XLA multiplies where all devices have the same. Under jit XLA's
partitioner puts the sums in by itself: `of_program` reads them off what it has compiled.

What a network makes of it is a model (`Network`), not a measurement.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import partial_eval
from ml_collections import ConfigDict

from normlab import models
from normlab.errors import UserError
from normlab.training import parallel
from normlab.training.layout import Layout
from normlab.training.setup import Parts, build_parts
from normlab.training.state import initial_state
from normlab.training.step import Batch, make_gradient, make_loss

FORWARD, BACKWARD, GRADIENT = "statistics, forward", "statistics, backward", "gradient, loss"


@dataclasses.dataclass(frozen=True)
class Volume:
    """Collectives of a part of a step, on each device."""

    rounds: int = 0  # collectives that wait for one another
    payload: int = 0  # bytes of the device's own arrays that go into them
    sent: float = 0.0  # bytes that leave the device, over rings

    def __add__(self, other: "Volume") -> "Volume":
        sums = map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
        return Volume(*sums)

    def times(self, count: int) -> "Volume":
        """Returns the volume of `count` such parts, one after another."""
        return Volume(*(count * value for value in dataclasses.astuple(self)))


_RING: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
}
"""What each of n devices sends over a ring, in parts of its own arrays; no algorithm sends less
(Patarasuk & Yuan 2009, doi:10.1016/j.jpdc.2008.09.002)."""

_PRIMITIVES = {"psum": "all-reduce", "all_gather": "all-gather", "reduce_scatter": "reduce-scatter"}


def of_step(config: ConfigDict, devices: int) -> dict[str, Volume]:
    """Returns {FORWARD, BACKWARD, GRADIENT: volume} of a step on so many devices.

    FORWARD has the running statistics, too. Raises UserError for a batch or ghost size that does
    not fit the devices.
    """
    parts = build_parts(config, need_data=False)
    share = _share(config, devices)
    model = models.build(config, parts.length, axis_name=parallel.AXIS)
    state = jax.eval_shape(lambda: initial_state(parts, jnp.zeros((), jnp.uint32)))
    arguments = state.params, state.batch_stats, _batch(parts, share)
    smoothing = config.train.label_smoothing

    def volume(function: Callable[..., Any]) -> Volume:
        traced = jax.make_jaxpr(function, axis_env=[(parallel.AXIS, devices)])(*arguments)
        jaxpr, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
        return _Flow(devices).volume(jaxpr)

    # The devices' gradients are summed only where the gradient is told of the axis.
    forward, both = volume(make_loss(model, smoothing)), volume(make_gradient(model, smoothing))
    whole = volume(make_gradient(model, smoothing, axis_name=parallel.AXIS))
    count = config.train.microbatches
    return {
        FORWARD: forward.times(count),
        BACKWARD: (both + forward.times(-1)).times(count),
        GRADIENT: whole + both.times(-1),
    }


def _share(config: ConfigDict, devices: int) -> int:
    """Returns the examples of a microbatch on one device."""
    size, count = config.train.batch_size, config.train.microbatches
    share, rest = divmod(size, devices * count)
    if devices < 1 or rest:
        raise UserError(f"a batch of {size} does not split over {devices} × {count} equal shares")
    scope = config.batch_stats
    if scope.scope == "ghost":
        layout = Layout(count, size // count, size // count, devices)
        try:
            layout.check_ghosts(scope.ghost_size)
        except ValueError as error:
            raise UserError(str(error)) from error
    return share


def _batch(parts: Parts, share: int) -> Batch:
    images: Any = jax.ShapeDtypeStruct((share, *parts.info.image_shape), jnp.float32)
    labels: Any = jax.ShapeDtypeStruct((share,), jnp.int32)
    return Batch(images, labels, jax.eval_shape(lambda: jax.random.key(0)))


class _Flow:
    """Follows values through a jaxpr: how many collectives each waited for, one after another."""

    def __init__(self, devices: int) -> None:
        self._devices = devices
        self._payload, self._sent = 0, 0.0

    def volume(self, jaxpr: Any) -> Volume:
        """Returns the volume of a whole jaxpr, all of its arguments at hand from the start."""
        rounds = self._follow(jaxpr, [0] * len(jaxpr.invars), 1)
        return Volume(max((r for r in rounds if r is not None), default=0), *self._sums())

    def _sums(self) -> tuple[int, float]:
        return self._payload, self._sent

    def _follow(self, jaxpr: Any, given: list[int | None], times: int) -> list[int | None]:
        """Returns the rounds of each output, None for a constant; `given` are the inputs'."""
        rounds: dict[Any, int | None] = dict(zip(jaxpr.invars, given, strict=True))

        def of(value: Any) -> int | None:
            return None if isinstance(value, core.Literal) else rounds.get(value)

        for equation in jaxpr.eqns:
            there = [of(value) for value in equation.invars]
            waited = max((r for r in there if r is not None), default=None)
            if waited is None:
                continue
            inner = _inner(equation)
            kind = _collective(equation)
            if kind is not None:
                self._add(kind, equation, there, times)
                after: list[int | None] = [waited + 1] * len(equation.outvars)
            elif inner is None:
                after = [waited] * len(equation.outvars)
            elif equation.primitive.name == "scan":
                length = equation.params["length"]
                found = self._follow(inner, [waited] * len(there), times * length)
                deepest = max((r for r in found if r is not None), default=waited)
                after = [waited + length * (deepest - waited)] * len(found)
            else:
                after = self._follow(inner, there, times)
            rounds.update(zip(equation.outvars, after, strict=True))
        return [of(value) for value in jaxpr.outvars]

    def _add(self, kind: str, equation: Any, there: list[int | None], times: int) -> None:
        summed = zip(equation.invars, there, strict=True)
        payload = sum(_bytes(value.aval) for value, rounds in summed if rounds is not None)
        groups = equation.params["axis_index_groups"]
        self._payload += times * payload
        self._sent += times * payload * _RING[kind](len(groups[0]) if groups else self._devices)


def _inner(equation: Any) -> Any:
    """Returns the jaxpr that an equation calls with its own arguments; None if there is none."""
    for value in equation.params.values():
        inner = value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
        if isinstance(inner, core.Jaxpr) and len(inner.invars) == len(equation.invars):
            return inner
    return None


def _collective(equation: Any) -> str | None:
    """Returns which collective over the devices an equation is; None if it is none.

    Raises KeyError for one that normlab has not had so far.
    """
    axes = equation.params.get("axes", equation.params.get("axis_name", ()))
    if parallel.AXIS not in (axes if isinstance(axes, tuple) else (axes,)):
        return None
    name = equation.primitive.name
    return None if name == "axis_index" else _PRIMITIVES[name]


def _bytes(array: Any) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


_COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-reduce|all-gather|reduce-scatter)\(.*?replica_groups=(\S+)"
)
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\[([\d,]*)\]")


def of_program(hlo: str, devices: int) -> Volume:
    """Returns the volume of a program compiled for CPU (`compiled.as_text()`), loops counted once.

    Its rounds are its collectives after XLA has merged some, whether or not they wait for one
    another.
    """
    total = Volume()
    for result, kind, groups in _COLLECTIVE.findall(hlo):
        size = _group_size(groups, devices)
        payload = sum(
            math.prod(int(length) for length in shape.split(",") if length) * int(bits or 8) // 8
            for _, bits, shape in _ARRAY.findall(result)
        )
        if kind == "all-gather":
            payload //= size
        if kind == "reduce-scatter":
            payload *= size
        total += Volume(1, payload, payload * _RING[kind](size))
    return total


def _group_size(groups: str, devices: int) -> int:
    """Returns the devices of a group of `{{0,1},{2,3}}` or `[4,2]<=[8]` (2); else all of them."""
    if iota := re.match(r"\[\d+,(\d+)\]<=", groups):
        return int(iota[1])
    first = re.match(r"\{\{([\d,]+)\}", groups)
    return len(first[1].split(",")) if first else devices


# Networks -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Network:
    """A published latency and bandwidth."""

    name: str
    devices: int
    latency: float  # seconds of an all-reduce of next to nothing over all devices
    bandwidth: float  # bytes a second, of the ring or the torus
    source: str

    def seconds(self, volume: Volume) -> float:
        """Returns how long the all-reduces take one after another: a model, no measurement."""
        return volume.rounds * self.latency + volume.sent / self.bandwidth


def _nccl(hosts: int, hop: float) -> float:
    """Returns NCCL's own estimate for 8 GPUs a host (src/graph/tuning.cc, protocol LL), seconds.

    On one host a ring, 3.6 + 2·7·0.47 µs; over h hosts a tree, 4.4 + 2·(7·1.8·0.52 + log₂ h · hop).
    """
    if hosts == 1:
        return (3.6 + 2 * 7 * 0.47) * 1e-6
    return (4.4 + 2 * (7 * 1.8 * 0.52 + math.log2(hosts) * hop)) * 1e-6


NETWORKS = (
    Network("NVLink 4, 8 GPUs", 8, _nccl(1, 0.0), 450e9, "900 GB/s both ways; NCCL"),
    Network("InfiniBand NDR, 8×8 GPUs", 64, _nccl(8, 5.0), 400e9, "8 × 400 Gb/s a host; NCCL"),
    Network("100 Gb Ethernet, TCP, 8×8 GPUs", 64, _nccl(8, 20.0), 12.5e9, "20 µs a hop; NCCL"),
    # An all-reduce goes over half of each ring of 4, twice (there and back): 2 · 3 axes · 2 hops.
    Network("TPU v4 ICI, 4×4×4 chips", 64, 12e-6, 3 * 90e9, "90 GB/s an axis, 1 µs a hop"),
)
