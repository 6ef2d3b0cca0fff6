"""Several runs at a time in one process, each on a device of its own.

Every run is trained by a thread, exactly as it would be alone: its folder, its events, its
evaluations, on its own device. Their steps alone are taken together: when each run has asked for
steps, one program takes those of all (`parallel.take_together`, mesh axis `seed`). Once a run has
ended, or asks for another number of steps, each goes on by itself.
"""

import copy
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from normlab.errors import UserError
from normlab.training import parallel
from normlab.training.setup import id_of
from normlab.training.signals import Signals

T = TypeVar("T")
Arguments = tuple[Any, Any, Any, Any]  # state, data, seed, rows


class Room:
    """Where the runs meet that take their steps together."""

    def __init__(self, devices: Sequence[jax.Device], signals: Signals) -> None:
        self.devices, self.signals = list(devices), signals
        self._turn = threading.Condition()
        self._present = set(range(len(self.devices)))
        self._asked: dict[int, Arguments] = {}
        self._given: dict[int, Any] = {}
        self._fault: BaseException | None = None

    def take(
        self,
        place: int,
        program: Callable[..., Any],
        compiler: parallel.Compiler,
        arguments: Arguments,
    ) -> Any:
        """Returns the state after the steps and their seconds, taken with all others.

        None if they are not all here. Waits until each run that is left has asked. What fails
        fails in all of them.
        """
        with self._turn:
            self._asked[place] = arguments
            self._settle(program, compiler)
            while place in self._asked and place not in self._given and not self._fault:
                self._turn.wait(timeout=1.0)
            if self._fault:
                raise RuntimeError("steps taken together failed") from self._fault
            self._asked.pop(place, None)
            return self._given.pop(place)

    def leave(self, place: int, compiler: parallel.Compiler | None = None) -> None:
        """Says that a run asks for no more steps."""
        with self._turn:
            self._present.discard(place)
            self._settle(None, compiler)

    def _settle(
        self, program: Callable[..., Any] | None, compiler: parallel.Compiler | None
    ) -> None:
        """Answers all, if all who are left have asked."""
        waiting = self._asked.keys() - self._given.keys()
        if not waiting or waiting != self._present:
            return
        asked = [self._asked[place] for place in sorted(waiting)]
        alike = len({np.shape(rows) for *_, rows in asked}) == 1
        if program is None or compiler is None or not alike or len(asked) < len(self.devices):
            self._given |= dict.fromkeys(waiting)  # each by itself
        else:
            try:
                start, compiled = time.perf_counter(), compiler.seconds
                states = parallel.take_together(program, self.devices, compiler, asked)
                jax.block_until_ready(states)
                seconds = time.perf_counter() - start - (compiler.seconds - compiled)
                self._given |= {place: (state, seconds) for place, state in enumerate(states)}
            except BaseException as fault:
                self._fault = fault
        self._turn.notify_all()


@dataclasses.dataclass
class Seat:
    """A run's place in a room."""

    room: Room
    place: int
    compiler: parallel.Compiler  # of what all take together
    seconds: float = 0.0  # of this run's steps, without waiting for others and for compilers

    @property
    def mesh(self) -> Mesh:
        """The mesh of the run's own device."""
        return Mesh(np.array([self.room.devices[self.place]]), ("data",))

    def taking(
        self, program: Callable[..., Any], alone: Callable[..., Any], compiler: parallel.Compiler
    ) -> Callable[[Any, Any, Any, np.ndarray], Any]:
        """Returns `take(state, data, seed, rows) -> state`, with the others or else `alone`.

        `compiler` is that of `alone`. After a signal, when the others are gone, it takes no step.
        """
        # All runs differ in their seed alone.
        self.compiler.options, self.compiler.compiled = compiler.options, compiler.compiled

        def take(state: Any, data: Any, seed: Any, rows: np.ndarray) -> Any:
            arguments = (state, data, seed, rows)
            together = self.room.take(self.place, program, self.compiler, arguments)
            if together is not None:
                state, seconds = together
                self.seconds += seconds
                return state
            if self.room.signals.received is not None:
                return state
            start, compiled = time.perf_counter(), compiler.seconds
            state = jax.block_until_ready(alone(*arguments))
            self.seconds += time.perf_counter() - start - (compiler.seconds - compiled)
            return state

        return take


def on_one_device(config: ConfigDict) -> ConfigDict:
    """Returns the config of the same run, its batch on one device.

    Raises UserError if it would be another run: with statistics by device.
    """
    alone = copy.deepcopy(config)
    alone.parallel.num_devices, alone.parallel.mode = 1, "jit"
    if id_of(alone) != id_of(config):
        raise UserError(
            "config field 'batch_stats.scope' = 'device' on one device of "
            f"{parallel.num_devices(config)} would be another run"
        )
    return alone


def run_together(works: Sequence[Callable[[Seat], T]], signals: Signals) -> list[T]:
    """Returns what each `work(seat)` returns, one a device, in threads.

    To be called from the thread that has the signals. Raises what a work raised, when all have
    ended, and ValueError for more works than devices.
    """
    devices = jax.local_devices()[: len(works)]
    if len(devices) < len(works):
        raise ValueError(f"{len(works)} runs do not fit {len(devices)} devices")
    room = Room(devices, signals)
    compiler = parallel.Compiler(mesh=Mesh(np.array(devices), (parallel.SEEDS,)))
    results: dict[int, T] = {}
    faults: list[BaseException] = []

    def work(place: int) -> None:
        try:
            with jax.default_device(devices[place]):
                results[place] = works[place](Seat(room, place, compiler))
        except BaseException as fault:
            faults.append(fault)
        finally:
            room.leave(place)

    threads = [
        threading.Thread(target=work, args=(place,), daemon=True) for place in range(len(works))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():  # so that a signal's handler gets its turn
            thread.join(timeout=0.2)
    if faults:
        raise faults[0]
    return [results[place] for place in range(len(works))]
