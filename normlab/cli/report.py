"""`normlab report DIR`: the table of a sweep on the terminal, and its page, Markdown and CSV."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

HELP = "tables, curves and one page from the run folders of a sweep"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "directory",
        metavar="DIR",
        type=Path,
        help="folder of a sweep (sweep.json), of one run (config.json), or of run folders",
    )
    parser.add_argument(
        "--interval", metavar="KIND", help="t or bootstrap (the experiment's, else t)"
    )


def main(args: argparse.Namespace) -> int:
    """Prints the table and the paths of the files; returns the exit code."""
    from normlab import report
    from normlab.errors import unknown
    from normlab.report.statistics import INTERVALS
    from normlab.run import is_locked

    if args.interval is not None and args.interval not in INTERVALS:
        raise unknown("interval", args.interval, INTERVALS)
    sweep = report.load(args.directory, alive=is_locked)
    sweep = replace(sweep, interval=args.interval or sweep.interval)
    report.show(sweep, sys.stdout)
    report.show_paths(report.write(args.directory, sweep), sys.stdout)
    return 0
