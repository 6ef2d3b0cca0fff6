"""`normlab train`: one run."""

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

from normlab import hosts
from normlab.cli import add_deterministic
from normlab.errors import UserError

HELP = "train one run, or resume it"
TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE.py[:choices]",
        help="e.g. configs/digits.py:norm=layer_norm; any field: --config.optim.base_lr=0.5",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder")
    add_deterministic(parser)
    several = parser.add_argument_group(
        "several processes", "one run on several machines; the same command on each (docs)"
    )
    several.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        choices=("auto",),
        help="this is one of the run's processes, as SLURM, Kubernetes or a TPU says, or:",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    several.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    several.add_argument("--process-id", type=int, metavar="I", help="which this one is, from 0")
    several.add_argument(
        "--distributed-timeout",
        type=int,
        default=hosts.TIMEOUT_SECONDS,
        metavar="SECONDS",
        help=f"how long one that is not there is waited for ({hosts.TIMEOUT_SECONDS})",
    )


def main(args: argparse.Namespace) -> int:
    """Trains and prints; returns 0, or 3 if the run diverged."""
    place = _place(args)
    if place is not None and not hosts.is_watched():
        hosts.check_reachable(place, min(20, args.distributed_timeout))
        return hosts.watch(args.command_line, place, args.distributed_timeout)
    from normlab.config import load_config

    config = load_config(args.config, args.overrides)
    if place is None:
        return train_and_print(config, args.workdir, args.overrides)
    from normlab.training.processes import joined

    with joined(place, args.distributed_timeout):
        return train_and_print(config, args.workdir, args.overrides, silent=place.index > 0)


def _place(args: argparse.Namespace) -> hosts.Place | None:
    """Returns which process of the run this one is; None if it is the only one.

    Raises UserError for flags that do not say it.
    """
    flags = args.coordinator, args.num_processes, args.process_id
    if args.distributed is None and flags == (None, None, None):
        return None
    if args.distributed_timeout < 1:
        raise UserError(f"--distributed-timeout={args.distributed_timeout} must be 1 or more")
    return hosts.find_place(*flags)


def train_and_print(
    config: Any, workdir: str, overrides: Mapping[str, Any], *, silent: bool = False
) -> int:
    """Does what `main` says for a config that is loaded; prints nothing if `silent`."""
    from normlab.training.loop import train

    what = f"{config.model.kind} with {config.norm.kind} on {config.data.name}, seed {config.seed}"
    progress = None if silent else _progress(what)
    result = train(config, workdir, overrides=overrides, progress=progress)
    code = 3 if result["status"] == "diverged" else 0
    if silent:
        return code
    for name, value in result.items():
        print(f"{name:40} {value:.6g}" if isinstance(value, float) else f"{name:40} {value}")
    print(f"in {workdir}")
    return code


def _progress(what: str) -> Callable[[int, int, Mapping[str, Any] | None], None]:
    """Returns what prints a first line, lines of metrics, and a sign of life between them."""
    begun: tuple[int, float] | None = None  # step and time of the first sign of life

    def show(step: int, num_steps: int, line: Mapping[str, Any] | None) -> None:
        nonlocal begun
        if begun is None:
            begun = step, time.monotonic()
            print(f"{what}: from step {step} to {num_steps}", flush=True)
        first_step, start = begun
        if line is not None:
            numbers = {k: v for k, v in line.items() if isinstance(v, (int, float)) and k != "step"}
            text = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            print(f"step {step}/{num_steps}  {line['split']:5}  {text}", flush=True)
        elif step > first_step:
            left = (num_steps - step) * (time.monotonic() - start) / (step - first_step)
            print(f"step {step}/{num_steps}  about {left:.0f} s left", flush=True)

    return show
