"""Starts the processes of one run on this machine, as users start them on several."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from normlab.training import checkpoint, parallel
from normlab.training.setup import build_parts
from normlab.training.state import create_state

FIELDS = {
    "model.widths": (4, 8),
    "model.strides": (2, 2),
    "log.every_steps": 5,
    "eval.every_steps": 6,
    "checkpoint.every_steps": 4,
    "log.tensorboard": False,
    "parallel.compilation_cache": "off",
}


def flags(fields):
    return [f"--config.{name}={value}" for name, value in fields.items()]


def command(folder, fields, source="configs/digits.py"):
    start = [sys.executable, "-m", "normlab", "train", f"--config={source}"]
    return [*start, f"--workdir={folder}", *flags(fields)]


def environment(devices=1):
    """One thread and `devices` devices a process, whose programs are soon compiled."""
    options = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "NPROC": "1", "XLA_FLAGS": options}


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(count, folder, fields, *, devices=1, timeout=60, source="configs/digits.py", own=None):
    """Starts the processes of a run; `own` are further arguments of some: {index: [...]}."""
    shared = [
        *("--distributed", f"--distributed-timeout={timeout}"),
        *(f"--coordinator=127.0.0.1:{free_port()}", f"--num-processes={count}"),
    ]
    return [
        subprocess.Popen(
            [
                *command(folder, fields, source),
                *shared,
                f"--process-id={i}",
                *(own or {}).get(i, []),
            ],
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def ended(processes, seconds=180):
    """Waits for all; returns [(exit code, what it wrote to stderr)], and leaves none behind."""
    try:
        outputs = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        (process.returncode, errors)
        for process, (_, errors) in zip(processes, outputs, strict=True)
    ]


def wait_for_checkpoint(folder, processes, step=1):
    """Waits until the run has a checkpoint of `step` or a later one."""
    while not any(there >= step for there in checkpoint.steps(Path(folder) / "checkpoints")):
        assert all(process.poll() is None for process in processes), "the run has ended"
        time.sleep(0.01)


def kill(process):
    """Ends with SIGKILL the process that trains, not the one that watches it."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)


def final_state(folder, config):
    """Returns (step, {place: array}) of the newest checkpoint."""
    like = create_state(build_parts(config), parallel.Compiler())
    step, state, _ = checkpoint.latest(folder / "checkpoints", like, {})
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return step, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
