"""`normlab eval`: a finished or unfinished run, measured again."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normlab.errors import UserError

HELP = "evaluate any checkpoint of a run: running, batch and recomputed statistics"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--fold",
        action="store_true",
        help="merge normalizers into the layers before them; print the speed-up",
    )


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares which checkpoint of which run is meant, and how it is evaluated."""
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("--step", type=int, help="the checkpoint's step (the newest good one)")
    parser.add_argument(
        "--weights", choices=("ema", "raw"), help="which weights (as the config's eval.use_ema)"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="examples at a time")
    parser.add_argument("--data-path", metavar="PATH", help="where the data set is now")


def checkpoint_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns those arguments as `restore.open_run` takes them; raises UserError for a bad size."""
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size={args.batch_size} must be 1 or more")
    return {
        "step": args.step,
        "use_ema": None if args.weights is None else args.weights == "ema",
        "batch_size": args.batch_size,
        "data_path": args.data_path,
    }


def print_metrics(metrics: Mapping[str, Any]) -> None:
    """Prints a line a metric."""
    for name, value in metrics.items():
        print(f"{name:40} {value:.6g}" if isinstance(value, float) else f"{name:40} {value}")


def main(args: argparse.Namespace) -> int:
    """Prints the metrics; writes nothing. Returns 0."""
    from normlab.analysis.folding import evaluate_folded
    from normlab.training.restore import evaluate_run

    measure = evaluate_folded if args.fold else evaluate_run
    print_metrics(measure(Path(args.run), **checkpoint_settings(args)))
    return 0
