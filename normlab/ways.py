"""How the runs of a sweep share this machine: chosen by a short measurement.

loop       one run at a time, on all devices
processes  one run a worker process, each on its own threads
devices    one run a device, all in one process (`training/replicas.py`)

The numbers of a run are the same in each: `loop` and `processes` to the bit, `devices` up to
rounding, for it is another program.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

from normlab.sweep import PlannedRun

WAYS = ("auto", "loop", "processes", "devices")
SECONDS = 0.5  # of measured steps of one run alone; the others take as many steps
WORTH_MEASURING = 2000  # steps of a sweep below which nothing is gained: processes are taken
ENOUGH = 1.05  # how much faster a way must be than a simpler one


class Measure(Protocol):
    """Measures so many steps of runs in a worker process, a device each if they are several."""

    def __call__(
        self, worker: int, runs: Sequence[PlannedRun], steps: int | None
    ) -> Mapping[str, Any]:
        """Returns {"step_seconds", "steps", "devices"}, or {"message"} where it fails."""
        ...


@dataclasses.dataclass(frozen=True)
class Way:
    """So many worker processes at work, each with so many runs at a time."""

    name: str
    workers: int
    together: int = 1


def groups(pending: Sequence[PlannedRun], size: int) -> list[list[PlannedRun]]:
    """Returns the runs in groups of at most `size` that differ in their seed alone, in order."""
    found: list[list[PlannedRun]] = []
    places: dict[Any, list[PlannedRun]] = {}
    for planned in pending:
        rest = {name: value for name, value in planned.overrides.items() if name != "seed"}
        key = planned.source, repr(sorted(rest.items()))
        group = places.get(key)
        if group is None or len(group) == size:
            group = places[key] = []
            found.append(group)
        group.append(planned)
    return found


def choose(
    pending: Sequence[PlannedRun], workers: int, measure: Measure, *, by_device: bool = True
) -> tuple[Way, str]:
    """Returns the fastest way for the runs, and a line that says why.

    `workers` processes can be measured. A way that fails is passed over; what all fail at, the runs
    will say. Without `by_device` that way is left out, whose last bits are others.
    """
    alone = measure(0, pending[:1], None)
    if "step_seconds" not in alone:
        return Way("processes", workers), f"not measured: {alone['message']}"
    found = {Way("loop", 1): alone["step_seconds"]}
    if workers > 1:
        many = _at_once(pending, workers, measure, alone["steps"])
        if many is not None:
            found[Way("processes", workers)] = many / workers
    seeds = groups(pending, alone["devices"])[0]
    if by_device and len(seeds) > 1:
        together = measure(0, seeds, alone["steps"])
        if "step_seconds" in together:
            way = Way("devices", 1, len(seeds))
            found[way] = together["step_seconds"] / len(seeds)
    best = next(iter(found))
    for way, seconds in found.items():
        if seconds * ENOUGH < found[best]:
            best = way
    told = ", ".join(
        f"{way.name}{f' ({n} at a time)' if (n := way.workers * way.together) > 1 else ''} "
        f"{1000 * seconds:.3g}"
        for way, seconds in found.items()
    )
    return best, f"{best.name}; ms a run's step, measured over {alone['steps']}: {told}"


def _at_once(
    pending: Sequence[PlannedRun], workers: int, measure: Measure, steps: int
) -> float | None:
    """Returns the seconds of a step while all workers take them; None if one fails."""
    with ThreadPoolExecutor(workers) as hands:
        # All are started and have compiled first, or one would have the machine to itself.
        for wanted in (1, steps):
            measured = partial(measure, runs=pending[:1], steps=wanted)
            told = list(hands.map(measured, range(workers)))
    times = [found["step_seconds"] for found in told if "step_seconds" in found]
    return max(times) if len(times) == workers else None
