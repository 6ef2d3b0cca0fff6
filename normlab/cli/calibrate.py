"""`normlab calibrate`: a run's statistics, recomputed over its training set."""

import argparse
from pathlib import Path

from normlab.cli.eval import add_checkpoint_arguments, checkpoint_settings, print_metrics

HELP = "recompute the statistics of any checkpoint over the training set, and measure all three"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--batches", type=int, metavar="N", help="use N training batches (all examples, once)"
    )
    parser.add_argument(
        "--workdir", metavar="DIR", help="a new folder for the calibrated checkpoint (none)"
    )


def main(args: argparse.Namespace) -> int:
    """Prints the metrics; writes only where --workdir says. Returns 0."""
    from normlab.analysis.calibration import calibrate

    metrics = calibrate(
        Path(args.run),
        num_batches=args.batches,
        workdir=None if args.workdir is None else Path(args.workdir),
        **checkpoint_settings(args),
    )
    print_metrics(metrics)
    return 0
