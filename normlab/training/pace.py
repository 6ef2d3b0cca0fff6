"""How long a step takes: measured before a sweep decides how its seeds share a machine."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from normlab.config import load_config
from normlab.data import train_indices
from normlab.training import parallel
from normlab.training.examples import load_data
from normlab.training.replicas import Seat, on_one_device, run_together
from normlab.training.setup import build_parts
from normlab.training.signals import Signals
from normlab.training.state import create_state
from normlab.training.step import how_to_step


def pace(
    runs: Sequence[Mapping[str, Any]], seconds: float, steps: int | None = None
) -> dict[str, Any]:
    """Returns {"step_seconds", "steps", "devices"}: of a step of each run, all at a time.

    Each run has `source` and `overrides`; several take a device each. Measures so many `steps`
    (None: for about `seconds`) after the first dispatch, which compiles. Nothing is written.
    """
    if len(runs) == 1:
        found = [_step_seconds(runs[0], seconds, steps, None)]
    else:
        works = [lambda seat, run=run: _step_seconds(run, seconds, steps, seat) for run in runs]
        found = run_together(works, Signals())
    spent, taken = max(found)
    return {"step_seconds": spent / taken, "steps": taken, "devices": jax.local_device_count()}


def _step_seconds(
    run: Mapping[str, Any], seconds: float, steps: int | None, seat: Seat | None
) -> tuple[float, int]:
    """Returns (seconds, steps) of what was measured."""
    config = load_config(run["source"], run["overrides"])
    if seat is not None:
        config = on_one_device(config)
    parallel.enable_compilation_cache(config)
    parts, compiler = build_parts(config), parallel.Compiler(parallel.in_order(config))
    mesh = parallel.make_mesh(config) if seat is None else seat.mesh
    data, how = load_data(config, mesh), how_to_step(parts, mesh)
    take = parallel.take_steps(*how, compiler)
    if seat is not None:
        take = seat.taking(parallel.steps_program(*how), take, compiler)
    state = parallel.replicate(create_state(parts, compiler), mesh)
    size, seed = parts.length.batch_size, parallel.seed_array(config.seed)
    together = parallel.steps_per_dispatch(config, resident=parts.info.one_size)

    def dispatch(first: int) -> float:
        nonlocal state
        indices = train_indices(config.seed, first, together, size, len(data.train))
        start = time.perf_counter()
        for examples, rows in data.train.steps(config.seed, first, indices, together):
            state = take(state, examples, seed, rows)
        jax.block_until_ready(state)
        return time.perf_counter() - start

    dispatch(0)
    spent, taken = 0.0, 0
    while (spent < seconds) if steps is None else (taken < steps):
        taken += together
        spent += dispatch(taken)
    return spent, taken
