"""The only home of mesh and jit: how a step is spread over devices and dispatched.

Arrays of examples are sharded over a one-dimensional mesh, axis `data`; the state is replicated.
Under jit a mean over the batch is a mean over the whole batch, however many devices hold it, so
the global scope is free; `device` and `ghost` are reshapes inside the normalizer.

On CPU a convolution inside `lax.scan` runs 19 to 30 times slower (XLA leaves its threaded kernels
there), so there each step is a dispatch of its own; accelerators scan over a chunk of steps.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from normlab.errors import UserError

State = TypeVar("State", bound=Any)

ACCELERATOR_STEPS_PER_DISPATCH = 50


def num_devices() -> int:
    """Returns the number of devices that share a batch."""
    return jax.device_count()


def make_mesh() -> Mesh:
    """Returns the mesh of all devices, axis `data`; those of a process stand together."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), ("data",))


def check_batch(config: ConfigDict) -> None:
    """Raises UserError, with the arithmetic, if the devices cannot split the global batch."""
    batch_size, devices = config.train.batch_size, num_devices()
    if batch_size % devices:
        below = batch_size - batch_size % devices
        nearest = " or ".join(str(size) for size in (below, below + devices) if size)
        raise UserError(
            f"config field 'train.batch_size' = {batch_size} does not split over {devices} devices "
            f"({batch_size} / {devices} = {batch_size / devices:g}); nearest: {nearest}"
        )


def steps_per_dispatch(config: ConfigDict, resident: bool = True) -> int:
    """Returns `parallel.steps_per_dispatch`, or the measured best: 1 on CPU, 50 elsewhere.

    Of data that is not `resident` on the devices, a dispatch holds its batches: then 1 everywhere.
    """
    chosen = config.parallel.steps_per_dispatch
    if chosen is None:
        many = resident and jax.default_backend() != "cpu"
        return ACCELERATOR_STEPS_PER_DISPATCH if many else 1
    if chosen < 1:
        raise UserError(f"config field 'parallel.steps_per_dispatch' = {chosen} must be 1 or more")
    return chosen


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts every array of the tree whole onto every device; all processes give the same arrays."""
    sharding = NamedSharding(mesh, PartitionSpec())
    if not mesh.is_multi_process:
        return jax.device_put(tree, sharding)

    def put(leaf: Any) -> Array:
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree)


def splittable(count: int, mesh: Mesh) -> int:
    """Returns the least number of rows from `count` on that the devices can share."""
    return -(-count // mesh.size) * mesh.size


def own_rows(count: int, mesh: Mesh) -> slice:
    """Returns which of the `count` rows of a batch this process's devices hold: consecutive ones.

    `count` is a multiple of the number of devices.
    """
    places = NamedSharding(mesh, PartitionSpec("data")).addressable_devices_indices_map((count,))
    bounds = [index[0].indices(count) for index in places.values() if index is not None]
    return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))


def put_rows(tree: Any, mesh: Mesh) -> Any:
    """Lays arrays over the devices, each giving this process's rows (`own_rows`) of a batch."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def shard_rows(array: Array, mesh: Mesh) -> Array:
    """Inside jit: lays the first axis (examples) over the devices, consecutive rows together."""
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec("data")))


def enable_compilation_cache(config: ConfigDict) -> None:
    """Turns on JAX's persistent compilation cache, unless the user has set it or turned it off.

    Its place: `parallel.compilation_cache`, else JAX_COMPILATION_CACHE_DIR, else the user's cache.
    """
    chosen = config.parallel.compilation_cache
    if chosen == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if chosen is None and jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(chosen) if chosen else base / "normlab" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


class Compiler:
    """Compiles ahead of time, so that compile time is counted apart from run time."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(
        self, name: str, function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()
    ) -> Callable[..., Any]:
        """Returns `function` compiled for these arguments; a second call returns it again.

        `donate` names the arguments whose buffers the result may take over.
        """
        shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(arguments))
        key = (name, jax.tree.structure(arguments), shapes)
        if key not in self._compiled:
            start = time.perf_counter()
            # What all processes are to read must be whole in each; XLA alone may leave it in parts.
            whole: dict[str, Any] = {}
            if jax.process_count() > 1:
                whole = {"out_shardings": NamedSharding(make_mesh(), PartitionSpec())}
            jitted = jax.jit(function, donate_argnums=donate, **whole)
            self._compiled[key] = jitted.lower(*arguments).compile()
            self.seconds += time.perf_counter() - start
        return self._compiled[key]


def steps(
    train_step: Callable[[State, Any], State],
    make_batch: Callable[[Array, Array, Array], Any],
    state: State,
    seed: Array,
    rows: Array,
    mesh: Mesh,
) -> State:
    """Takes one step for each row of `rows` (int32 [steps, batch], the examples of a step).

    `make_batch(seed, step, indices) -> batch` runs on the device. The batch's arrays are of the
    examples, but for a scalar (a random key), which every device has.
    """

    def spread(array: Array) -> Array:
        return shard_rows(array, mesh) if array.ndim else array

    def one(state: State, indices: Array) -> State:
        batch = make_batch(seed, state.step, shard_rows(indices, mesh))
        return train_step(state, jax.tree.map(spread, batch))

    if rows.shape[0] == 1:
        return one(state, rows[0])
    return jax.lax.scan(lambda s, indices: (one(s, indices), None), state, rows)[0]


def seed_array(seed: int) -> Array:
    """Returns the seed as an argument of a compiled program, so that seeds share the program."""
    return jnp.asarray(seed, jnp.uint32)
