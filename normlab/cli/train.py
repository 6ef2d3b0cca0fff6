"""`normlab train`: one run."""

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

from normlab.cli import add_deterministic

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


def main(args: argparse.Namespace) -> int:
    """Trains and prints; returns 0, or 3 if the run diverged."""
    from normlab.config import load_config

    config = load_config(args.config, args.overrides)
    return train_and_print(config, args.workdir, args.overrides)


def train_and_print(config: Any, workdir: str, overrides: Mapping[str, Any]) -> int:
    """Does what `main` says for a config that is loaded."""
    from normlab.training.loop import train

    what = f"{config.model.kind} with {config.norm.kind} on {config.data.name}, seed {config.seed}"
    result = train(config, workdir, overrides=overrides, progress=_progress(what))
    for name, value in result.items():
        print(f"{name:40} {value:.6g}" if isinstance(value, float) else f"{name:40} {value}")
    print(f"in {workdir}")
    return 3 if result["status"] == "diverged" else 0


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
