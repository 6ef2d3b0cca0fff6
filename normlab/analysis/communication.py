"""What devices tell each other in a step of training: counted from the program, nothing is run.

A replica of the step (`parallel.mode` pmap) is traced with an axis of any number of devices, and
the all-reduces in its jaxpr are what the normalizers ask for. Under jit XLA's partitioner decides
the same sums by itself: `of_program` reads them off what it has compiled.

What a network makes of it is a model (`Network`), not a measurement: every all-reduce of statistics
waits for the one before it, so a step takes calls × latency + bytes sent / bandwidth.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from normlab import models
from normlab.errors import UserError
from normlab.models.cost import equations
from normlab.training import parallel
from normlab.training.setup import Parts, build_parts
from normlab.training.state import initial_state
from normlab.training.step import Batch, make_gradient, make_loss

FORWARD, BACKWARD, GRADIENT = "statistics, forward", "statistics, backward", "gradient, loss"


@dataclasses.dataclass(frozen=True)
class Volume:
    """All-reduces of a part of a step, on each device."""

    calls: int = 0
    payload: int = 0  # bytes, of the arrays that are summed
    sent: float = 0.0  # bytes that leave the device, by the ring

    def __add__(self, other: "Volume") -> "Volume":
        return Volume(
            self.calls + other.calls, self.payload + other.payload, self.sent + other.sent
        )

    def __sub__(self, other: "Volume") -> "Volume":
        return self + other.times(-1)

    def times(self, count: int) -> "Volume":
        """Returns the volume of `count` such parts."""
        return Volume(count * self.calls, count * self.payload, count * self.sent)


def all_reduce(payload: int, devices: int) -> Volume:
    """Returns an all-reduce of so many bytes over a ring: each device sends 2(N − 1)/N of them.

    (Patarasuk & Yuan 2009, doi:10.1016/j.jpdc.2008.09.002: no algorithm sends less.)
    """
    return Volume(1, payload, 2 * (devices - 1) / devices * payload)


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
    loss = make_loss(model, smoothing, parallel.AXIS)
    part = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True, allow_int=True)

    def volume(function: Callable[..., Any]) -> Volume:
        traced = jax.make_jaxpr(function, axis_env=[(parallel.AXIS, devices)])(*arguments)
        return sum(_volumes(traced.jaxpr, devices), Volume())

    forward, both = volume(loss), volume(part)
    whole = volume(make_gradient(model, smoothing, axis_name=parallel.AXIS))
    count = config.train.microbatches
    return {
        FORWARD: forward.times(count),
        BACKWARD: (both - forward).times(count),
        GRADIENT: whole - both,
    }


def _share(config: ConfigDict, devices: int) -> int:
    """Returns the examples of a microbatch on one device."""
    size, count = config.train.batch_size, config.train.microbatches
    share, rest = divmod(size, devices * count)
    if devices < 1 or rest:
        raise UserError(f"a batch of {size} does not split over {devices} × {count} equal shares")
    scope = config.batch_stats
    if scope.scope == "ghost":
        layout = parallel.Layout(count, size // count, size // count, devices)
        try:
            parallel.check_replicas(layout, scope.ghost_size)
        except ValueError as error:
            raise UserError(str(error)) from error
    return share


def _batch(parts: Parts, share: int) -> Batch:
    images = jax.ShapeDtypeStruct((share, *parts.info.image_shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((share,), jnp.int32)
    return Batch(images, labels, jax.eval_shape(lambda: jax.random.key(0)))


def _volumes(jaxpr: Any, devices: int) -> Iterable[Volume]:
    for equation, times in equations(jaxpr):
        axes = equation.params.get("axes", equation.params.get("axis_name", ()))
        if parallel.AXIS not in (axes if isinstance(axes, tuple) else (axes,)):
            continue
        name = equation.primitive.name
        if name == "axis_index":
            continue
        assert name.startswith("psum"), name
        groups = equation.params.get("axis_index_groups")
        payload = sum(_bytes(variable.aval) for variable in equation.invars)
        yield all_reduce(payload, len(groups[0]) if groups else devices).times(times)


def _bytes(array: Any) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


_ALL_REDUCE = re.compile(r"= (\(.*?\)|\S+) all-reduce(?:-start)?\(.*?replica_groups=(\S+)")
_ARRAY = re.compile(r"([a-z]+)(\d+)\[([\d,]*)\]")


def of_program(hlo: str, devices: int) -> Volume:
    """Returns the volume of a compiled program (`compiled.as_text()`), loops counted once.

    Raises ValueError if it has a collective that is no all-reduce.
    """
    other = re.search(r" (all-gather|all-to-all|reduce-scatter|collective-permute)\S*\(", hlo)
    if other:
        raise ValueError(f"the program has a collective of another kind: {other[1]}")
    total = Volume()
    for result, groups in _ALL_REDUCE.findall(hlo):
        payload = sum(
            math.prod(int(size) for size in sizes.split(",") if size) * max(int(bits) // 8, 1)
            for _, bits, sizes in _ARRAY.findall(result.replace("pred[", "pred8["))
        )
        total += all_reduce(payload, _group_size(groups, devices))
    return total


def _group_size(groups: str, devices: int) -> int:
    """Returns the devices of a group of `{{0,1},{2,3}}`, `[2,4]<=[8]` (4), or `{}` (all)."""
    if iota := re.match(r"\[\d+,(\d+)\]", groups):
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
        return volume.calls * self.latency + volume.sent / self.bandwidth


def _nccl(hosts: int, hop: float) -> float:
    """Returns NCCL's own estimate for 8 GPUs a host (src/graph/tuning.cc, protocol LL), seconds.

    On one host a ring, 3.6 + 2·7·0.47 µs; over hosts a tree, 4.4 + 2·(7·1.8·0.52 + log₂ hosts · hop).
    """
    if hosts == 1:
        return (3.6 + 2 * 7 * 0.47) * 1e-6
    return (4.4 + 2 * (7 * 1.8 * 0.52 + np.log2(hosts) * hop)) * 1e-6


NETWORKS = (
    Network("NVLink 4, 8 GPUs", 8, _nccl(1, 0.0), 450e9, "900 GB/s both ways; NCCL"),
    Network("InfiniBand NDR, 8×8 GPUs", 64, _nccl(8, 5.0), 400e9, "8 × 400 Gb/s a host; NCCL"),
    Network("100 Gb Ethernet, TCP, 8×8 GPUs", 64, _nccl(8, 20.0), 12.5e9, "20 µs a hop; NCCL"),
    # An all-reduce goes over half of each ring of 4, twice (there and back): 2 · 3 axes · 2 hops.
    Network("TPU v4 ICI, 4×4×4 chips", 64, 12e-6, 3 * 90e9, "90 GB/s an axis, 1 µs a hop"),
)
