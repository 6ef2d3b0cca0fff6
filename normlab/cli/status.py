"""`normlab status`: the state of each run."""

import argparse
from collections import Counter
from pathlib import Path

HELP = "show the state of a run, or of each run of a comparison"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("directory", metavar="DIR", help="a run's folder, or a comparison's")


def main(args: argparse.Namespace) -> int:
    """Prints a line a run and the count of each state; returns 0."""
    from normlab.report import rows
    from normlab.run import is_locked

    sweep = rows.load(Path(args.directory), alive=is_locked)
    for row in sweep.rows:
        label = f"{row.setting}  {row.norm}  seed {row.seed}"
        step = "" if row.step is None else f"step {row.step}"
        shared = f"(the run of {row.shared_with!r})" if row.shared_with else ""
        parts = (row.id, f"{row.state:11}", label, step, row.message, shared)
        print("  ".join(filter(None, parts)))
    counts = Counter(row.state for row in sweep.runs())
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return 0
