"""`normlab eval`: a finished or unfinished run, measured again."""

import argparse
from pathlib import Path

from normlab.errors import UserError

HELP = "evaluate any checkpoint of a run: running, batch and recomputed statistics"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("--step", type=int, help="the checkpoint's step (the newest good one)")
    parser.add_argument(
        "--weights", choices=("ema", "raw"), help="which weights (as the config's eval.use_ema)"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="examples at a time")
    parser.add_argument("--data-path", metavar="PATH", help="where the data set is now")


def main(args: argparse.Namespace) -> int:
    """Prints the metrics; writes nothing. Returns 0."""
    from normlab.training.restore import evaluate_run

    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size={args.batch_size} must be 1 or more")
    metrics = evaluate_run(
        Path(args.run),
        step=args.step,
        use_ema=None if args.weights is None else args.weights == "ema",
        batch_size=args.batch_size,
        data_path=args.data_path,
    )
    for name, value in metrics.items():
        print(f"{name:40} {value:.6g}" if isinstance(value, float) else f"{name:40} {value}")
    return 0
