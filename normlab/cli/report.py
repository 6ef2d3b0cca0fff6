"""`normlab report DIR`: the table of a sweep on the terminal, and its page, Markdown and CSV."""

import argparse
import sys
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


def main(args: argparse.Namespace) -> int:
    """Prints the table and the paths of the files; returns the exit code."""
    from normlab import report

    sweep = report.load(args.directory)
    paths = report.write(args.directory, sweep)
    report.show(sweep, sys.stdout)
    for path in paths:
        print(path)
    return 0
