"""Several processes of one run, in lockstep.

Each holds its consecutive rows of every batch; the state is whole on every device. Process 0 alone
has the run's folder: it reads and writes it, and tells the others what they need to know of it, so
they need no file system in common. With one process, which is the usual case, nothing here does
anything.

What the processes decide from the state or the config they decide alike. What one alone can know
(a signal, a folder that cannot be used, data that are not there) goes through `agreed`,
`from_first` or `Flag`, which all of them call at the same places.
"""

import atexit
import contextlib
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from normlab.errors import MachineFault, UserError, one_line
from normlab.hosts import Place, lost
from normlab.run import first_difference
from normlab.training import parallel
from normlab.training.signals import Interrupted

T = TypeVar("T")

_SAVING_SECONDS = 3600
"""How long the others wait at the end for process 0, which may be writing a large checkpoint."""


class EndedTogether(Exception):
    """What stopped one process, as all of them say it, each with that one's exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(message)


def is_first() -> bool:
    """Returns whether this is process 0, which reads and writes the run's folder."""
    return jax.process_index() == 0


def are_several() -> bool:
    """Returns whether the run has more than this process."""
    try:
        return jax.process_count() > 1
    except RuntimeError as error:  # the first that asks for devices, e.g. JAX_PLATFORMS=tpuu
        raise UserError(f"JAX finds no devices: {str(error).splitlines()[0]}") from error


# Beginning and end -------------------------------------------------------------------------------


@contextlib.contextmanager
def joined(place: Place, timeout: int) -> Iterator[None]:
    """Makes this process one of the run's within the block; before it no device may be touched.

    `timeout` (seconds) is how long a process that does not come, or gives no sign of life, is
    waited for; JAX then aborts, which `hosts.watch` turns into a line. Processes that end the block
    together wait for each other. One that fails alone leaves at once, or all would wait for it.
    """
    if place.count == 1:
        yield
        return
    # JAX would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.index,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=_SAVING_SECONDS,
            cluster_detection_method="deactivate",
        )
    except (RuntimeError, ValueError) as error:
        raise MachineFault(
            f"process {place.index} of {place.count} cannot join the run at {place.coordinator}: "
            f"{one_line(error)}"
        ) from error
    try:
        with losses_named():
            _check_devices()
            yield
    except (EndedTogether, Interrupted):
        jax.distributed.shutdown()
        raise
    except BaseException as error:
        # JAX's own exit handler would wait for those who wait for this process.
        atexit.register(_leave, getattr(error, "exit_code", 1))
        raise
    else:
        jax.distributed.shutdown()


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def losses_named() -> Iterator[None]:
    """Raises MachineFault, one line, if in the block another process turns out to be gone."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        marks = ("Gloo", "Connection closed by peer", "coordination service", "NCCL")
        if are_several() and any(mark in str(error) for mark in marks):
            raise MachineFault(lost(jax.process_index(), jax.process_count())) from error
        raise


def _check_devices() -> None:
    local, every = jax.local_device_count(), jax.device_count()
    if local * jax.process_count() != every:
        raise UserError(
            f"this process has {local} of the run's {every} devices: each of the "
            f"{jax.process_count()} processes needs as many as the others"
        )


# Agreement ---------------------------------------------------------------------------------------


def exchange(value: Any) -> list[Any]:
    """Returns what each process gives, in their order; a value of JSON."""
    if not are_several():
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(text.size, np.int32))
    # Of few sizes, for each is compiled once.
    padded = np.zeros(-(-int(sizes.max()) // 4096) * 4096, np.uint8)
    padded[: text.size] = text
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(texts, sizes, strict=True)]


def agreed(work: Callable[[], T]) -> T:
    """Returns work(), which every process does; raises EndedTogether in all if it fails in one.

    Failures are UserError, MachineFault and OSError. One process alone raises its own.
    """
    if not are_several():
        return work()
    failure = None
    try:
        result = work()
    except (UserError, MachineFault, OSError) as error:
        failure = {"text": one_line(error), "code": getattr(error, "exit_code", 1)}
    failures = exchange(failure)
    for index, told in enumerate(failures):
        if told is not None:
            alone = failures.count(told) < len(failures)
            where = f"process {index}: " if alone and index else ""
            raise EndedTogether(where + told["text"], told["code"])
    return result


def from_first(work: Callable[[], T]) -> T:
    """Returns process 0's work(), a value of JSON, which it alone does; its failure is all's."""
    if not are_several():
        return work()
    return exchange(agreed(lambda: work() if is_first() else None))[0]


def check_same(what: str, facts: Mapping[str, Any]) -> None:
    """Raises EndedTogether in all processes if they have not the same `facts`, values of JSON.

    `what` says of what kind they are.
    """
    given = exchange(dict(facts))
    for index, other in enumerate(given):
        difference = first_difference(given[0], other)
        if difference:
            name, first, here = difference
            raise EndedTogether(
                f"{what} {name!r} is {first!r} in process 0 and {here!r} in process {index}; "
                "start all with the same command and the same data",
                UserError.exit_code,
            )


def broadcast(tree: Any) -> Any:
    """Returns process 0's arrays, bit for bit; every process has a tree of the same form."""
    if not are_several():
        return tree
    leaves, structure = jax.tree.flatten(tree)
    arrays = [np.asarray(leaf) for leaf in leaves]
    # As bytes: they are summed with zeros, and -0 + 0 would be 0.
    told = multihost_utils.broadcast_one_to_all([_bytes(array) for array in arrays])
    found = [
        np.asarray(data).view(array.dtype).reshape(array.shape)
        for data, array in zip(told, arrays, strict=True)
    ]
    return jax.tree.unflatten(structure, found)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class Flag:
    """A number that one process may raise, seen by all at the same call.

    Each call gives this process's number and returns the highest that any gave two calls ago, so no
    process waits for its devices; with one process, the number itself. Once raised it stays.
    """

    def __init__(self) -> None:
        self._asked: deque[Any] = deque()
        self._seen = 0

    def __call__(self, number: int) -> int:
        """Returns the highest number that all know of by now; `number` is from 0."""
        if not are_several():
            return number
        mesh = parallel.make_mesh()
        mine = np.full(jax.local_device_count(), number, np.int32)
        self._asked.append(_highest(parallel.put_rows(mine, mesh)))
        if len(self._asked) > 2:
            self._seen = max(self._seen, int(self._asked.popleft()))
        return self._seen


@jax.jit
def _highest(numbers: jax.Array) -> jax.Array:
    return numbers.max()
