"""The only home of mesh, jit and pmap: how a step is spread over devices and dispatched.

Mode `jit`: arrays of examples are sharded over a one-dimensional mesh, axis `data`; the state is
replicated. A mean over the batch is a mean over the whole batch, however many devices hold it, so
the global scope is free; `device` and `ghost` are reshapes inside the normalizer.

Mode `pmap`: a replica of the step on each device sees that device's share alone. So statistics by
device are free, and all others go through collectives over the axis `batch`, weighted by counts.
(JAX keeps pmap for old code; it is here to check that both views give the same numbers.)

The examples of a batch, and all that is drawn for them, are made under jit in both modes.

On CPU a convolution inside `lax.scan` runs 19 to 30 times slower (XLA leaves its threaded kernels
there), so there each step is a dispatch of its own; accelerators scan over a chunk of steps.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from normlab.errors import UserError, unknown
from normlab.training.layout import Layout, split_batch

State = TypeVar("State", bound=Any)

ACCELERATOR_STEPS_PER_DISPATCH = 50
MODES = ("jit", "pmap")
AXIS = "batch"
"""Name of the devices' axis under pmap."""
SEEDS = "seed"
"""Name of the devices' axis where each takes the steps of a run of its own."""


def devices(config: ConfigDict | None = None) -> list[jax.Device]:
    """Returns the devices that share a batch: the first `parallel.num_devices`, or all.

    Those of a process stand together. Raises UserError if there are not so many.
    """
    there = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    wanted = None if config is None else config.parallel.num_devices
    if wanted is None:
        return there
    if jax.process_count() > 1 and wanted != len(there):
        raise UserError(
            f"config field 'parallel.num_devices' = {wanted}: the run's {jax.process_count()} "
            f"processes use all of their {len(there)} devices"
        )
    if not 1 <= wanted <= len(there):
        raise UserError(
            f"config field 'parallel.num_devices' = {wanted} must be from 1 to {len(there)}, "
            "the devices that there are"
        )
    return there[:wanted]


def num_devices(config: ConfigDict | None = None) -> int:
    """Returns the number of devices that share a batch."""
    return len(devices(config))


def make_mesh(config: ConfigDict | None = None) -> Mesh:
    """Returns the mesh of the devices that share a batch, axis `data`."""
    return Mesh(np.array(devices(config)), ("data",))


def axis_name(config: ConfigDict) -> str | None:
    """Returns the name of the devices' axis that a replica's collectives go over; None under jit.

    Raises UserError for an unknown `parallel.mode`, and for pmap in several processes.
    """
    if config.parallel.mode not in MODES:
        raise unknown("'parallel.mode'", config.parallel.mode, MODES)
    if config.parallel.mode == "pmap" and jax.process_count() > 1:
        raise UserError("config field 'parallel.mode' = 'pmap': several processes need 'jit'")
    return AXIS if config.parallel.mode == "pmap" else None


def make_layout(config: ConfigDict) -> Layout:
    """Returns how the config's batch lies on its devices; raises as `layout.split_batch` does."""
    return split_batch(config, num_devices(config), axis_name(config) is not None)


def lay_out(batch: Any, layout: Layout, mesh: Mesh) -> Any:
    """Inside jit: returns the batch with its rows as the layout has them.

    `batch`: a named tuple whose arrays are of the examples, [B, ...], but for a scalar (a random
    key), which every device has; its `mask` is set where there is padding. The arrays become
    [rows, ...], with [microbatches] before it if there are several, and under pmap
    [replicas, rows of one, ...] in place of the rows.
    """
    if layout.padded:
        count = layout.microbatches * layout.examples
        batch = batch._replace(mask=jnp.ones(count, bool))

    def spread(array: Array) -> Array:
        if array.ndim == 0:
            return array
        parts = array.reshape(layout.microbatches, layout.examples, *array.shape[1:])
        padding = [(0, 0)] * parts.ndim
        padding[1] = (0, layout.rows - layout.examples)
        parts = jnp.pad(parts, padding) if layout.padded else parts
        if layout.replicas is not None:
            parts = parts.reshape(layout.microbatches, layout.replicas, -1, *array.shape[1:])
        if layout.microbatches == 1:
            return shard_rows(parts[0], mesh)
        if mesh.size == 1:
            return parts
        return jax.lax.with_sharding_constraint(
            parts, NamedSharding(mesh, PartitionSpec(None, "data"))
        )

    return jax.tree.map(spread, batch)


def steps_per_dispatch(config: ConfigDict, resident: bool = True) -> int:
    """Returns `parallel.steps_per_dispatch`, or the measured best: 1 on CPU, 50 elsewhere.

    Of data that is not `resident` on the devices, a dispatch holds its batches: then 1 everywhere.
    """
    chosen = config.parallel.steps_per_dispatch
    single = axis_name(config) is not None
    if chosen is None:
        many = resident and not single and jax.default_backend() != "cpu"
        return ACCELERATOR_STEPS_PER_DISPATCH if many else 1
    if single and chosen != 1:
        raise UserError(
            f"config field 'parallel.steps_per_dispatch' = {chosen}: mode pmap takes 1 at a time"
        )
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
    if mesh.size == 1:
        return array
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


def in_order(config: ConfigDict) -> dict[str, Any]:
    """Returns the compiler's options with which a part of a step waits for the one before it.

    Rematerialization and microbatches save memory only so. XLA's CPU backend takes the barriers
    that say it away before it merges equal computations and orders the rest, unless told not to
    (ResNet-20, 64 images of 32×32: 116 MiB of temporaries, rematerialized 45 and not 116, in 4
    microbatches 31 and not 115; jaxlib 0.10.2).
    """
    asked = config.train.remat or config.train.microbatches > 1
    if not asked or jax.default_backend() != "cpu":
        return {}
    return {"xla_disable_hlo_passes": "cse_barrier_expander"}


class Compiler:
    """Compiles ahead of time, so that compile time is counted apart from run time."""

    def __init__(
        self,
        options: Mapping[str, Any] | None = None,
        compiled: dict[Any, Callable[..., Any]] | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """`options` are XLA's own, of this compiler's programs, for the devices of `mesh`.

        `compiled` has those that there are, perhaps for other devices, too.
        """
        self.seconds = 0.0
        self.options = dict(options or {})
        self.compiled = {} if compiled is None else compiled
        self._devices = () if mesh is None else tuple(mesh.device_ids.flat)

    def __call__(
        self,
        name: str,
        function: Callable[..., Any],
        *arguments: Any,
        donate: tuple[int, ...] = (),
        layout: Layout | None = None,
    ) -> Callable[..., Any]:
        """Returns `function` compiled for these arguments; a second call returns it again.

        `donate` names the arguments whose buffers the result may take over. With a `layout` of
        replicas it is `function(state, batch)`, a replica of it on each device.
        """
        shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(arguments))
        key = (name, self._devices, jax.tree.structure(arguments), shapes)
        if key not in self.compiled:
            start = time.perf_counter()
            mapped = _replicas(function, layout, arguments[1], donate) if layout else None
            # What all processes read must be whole in each; XLA alone may leave it in parts.
            whole = NamedSharding(make_mesh(), PartitionSpec()) if jax.process_count() > 1 else None
            jitted = mapped or jax.jit(function, donate_argnums=donate, out_shardings=whole)
            self.compiled[key] = jitted.lower(*arguments).compile(self.options)
            self.seconds += time.perf_counter() - start
        return self.compiled[key]

    def planned_bytes(self, name: str) -> int | None:
        """Returns what XLA plans that the largest program of a name holds on one device.

        Arguments, results and temporaries; None if there is none, or no plan.
        """
        own = [made for key, made in [*self.compiled.items()] if key[:2] == (name, self._devices)]
        plans = map(_planned_bytes, own)
        return max((plan for plan in plans if plan is not None), default=None)


MakeBatch = Callable[[Any, Array, Array, Array], Any]
"""`make_batch(data, seed, step, indices) -> batch`, on the device."""


def _laid_out(make_batch: MakeBatch, layout: Layout, mesh: Mesh) -> MakeBatch:
    def lie(data: Any, seed: Array, step: Array, indices: Array) -> Any:
        return lay_out(make_batch(data, seed, step, shard_rows(indices, mesh)), layout, mesh)

    return lie


def steps_program(
    train_step: Callable[[State, Any], State], make_batch: MakeBatch, layout: Layout, mesh: Mesh
) -> Callable[[State, Any, Array, Array], State]:
    """Returns `program(state, data, seed, rows) -> state`: a step for each row of `rows`."""
    lie = _laid_out(make_batch, layout, mesh)

    def program(state: State, data: Any, seed: Array, rows: Array) -> State:
        def one(state: State, indices: Array) -> State:
            return train_step(state, lie(data, seed, state.step, indices))

        if rows.shape[0] == 1:
            return one(state, rows[0])
        return jax.lax.scan(lambda s, indices: (one(s, indices), None), state, rows)[0]

    return program


def take_together(
    program: Callable[..., State],
    devices: Sequence[jax.Device],
    compiler: Compiler,
    arguments: Sequence[Any],
) -> list[State]:
    """Returns `program(*arguments[i])` of each run i, each computed on `devices[i]` alone.

    One program for all, over a mesh whose axis is `seed`; nothing goes between devices. The first
    of a run's arguments, its state, is donated. Arrays of a run that are on its device stay there.
    """
    mesh = Mesh(np.array(devices), (SEEDS,))
    sharding = NamedSharding(mesh, PartitionSpec(SEEDS))
    like = arguments[0][0]

    def joined(*leaves: Any) -> Array:
        local = [
            jax.device_put(leaf if np.ndim(leaf) else np.reshape(leaf, 1), device)
            for leaf, device in zip(leaves, devices, strict=True)
        ]
        whole = (len(local) * local[0].shape[0], *local[0].shape[1:])
        return jax.make_array_from_single_device_arrays(whole, sharding, local)

    def of_one(*blocks: Any) -> State:
        own = jax.tree.map(
            lambda block, leaf: block if np.ndim(leaf) else block[0], blocks, tuple(arguments[0])
        )
        return jax.tree.map(lambda x: x if x.ndim else x[None], program(*own))

    def together(*joined: Any) -> State:
        spec = PartitionSpec(SEEDS)
        mapped = jax.shard_map(of_one, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        return mapped(*joined)

    whole = jax.tree.map(joined, *map(tuple, arguments))
    states = compiler("train", together, *whole, donate=(0,))(*whole)
    places = {device: place for place, device in enumerate(devices)}

    def split(leaf: Array, like: Any) -> list[Array]:
        parts = {places[shard.device]: shard.data for shard in leaf.addressable_shards}
        found = [parts[place] for place in range(len(devices))]
        return found if like.ndim else [part[0] for part in found]

    leaves, structure = jax.tree.flatten(states)
    parts = map(split, leaves, jax.tree.leaves(like))
    return [jax.tree.unflatten(structure, own) for own in zip(*parts, strict=True)]


def take_steps(
    train_step: Callable[[State, Any], State],
    make_batch: MakeBatch,
    layout: Layout,
    mesh: Mesh,
    compiler: Compiler,
) -> Callable[[State, Any, Array, np.ndarray], State]:
    """Returns `take(state, data, seed, rows) -> state`, compiled when it is first needed.

    It takes one step for each row of `rows` (int32 [steps, batch], the examples of a step); the
    state is donated.
    """
    lie = _laid_out(make_batch, layout, mesh)
    program = steps_program(train_step, make_batch, layout, mesh)

    def take(state: State, data: Any, seed: Array, rows: np.ndarray) -> State:
        if layout.replicas is None:
            arguments = (state, data, seed, rows)
            return compiler("train", program, *arguments, donate=(0,))(*arguments)
        arguments = (data, seed, state.step, rows[0])
        batch = compiler("batch", lie, *arguments)(*arguments)
        replicated = compiler("train", train_step, state, batch, donate=(0,), layout=layout)
        return replicated(state, batch)

    return take


def _planned_bytes(compiled: Any) -> int | None:
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    arrays = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return int(arrays + plan.temp_size_in_bytes)


def _replicas(
    function: Callable[..., Any], layout: Layout, batch: Any, donate: tuple[int, ...]
) -> Any:
    """Returns `function(state, batch)` with a replica on each device; the state is all replicas'.

    All replicas compute the same state, from collectives.
    """
    axis = 0 if layout.microbatches == 1 else 1
    axes = jax.tree.map(lambda array: axis if array.ndim else None, batch)
    devices = jax.devices()[: layout.replicas]
    return jax.pmap(
        function,
        axis_name=AXIS,
        in_axes=(None, axes),
        out_axes=None,
        donate_argnums=donate,
        devices=devices,
    )


def seed_array(seed: int) -> Array:
    """Returns the seed as an argument of a compiled program, so that seeds share the program."""
    return jnp.asarray(seed, jnp.uint32)
