"""What `compare`, `sweep` and `paper` have in common: run a plan, then report on it."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from normlab import report, sweep
from normlab.cli import add_deterministic
from normlab.errors import UserError


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares how a plan is run."""
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N-1")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time (one a core; on a GPU one)"
    )
    parser.add_argument(
        "--launcher",
        default="local",
        metavar="NAME[:option=value,...]",
        help="local, slurm, kubernetes (docs/launching.md); e.g. slurm:partition=gpu,gpus=1",
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads a run (1)")
    parser.add_argument(
        "--redo-other-commits",
        action="store_true",
        help="run again what another commit of normlab ran; the old run is kept aside",
    )
    add_deterministic(parser)


def check_run_arguments(args: argparse.Namespace) -> None:
    """Puts the launcher in its name's place; raises UserError for a wrong one, or a number below 1.

    (A mistake is to be found before anything is planned.)
    """
    from normlab import launchers

    args.launcher = launchers.parse(args.launcher)
    for name in ("seeds", "jobs", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} must be 1 or more")


def execute(
    plan: sweep.Plan,
    folder: Path,
    args: argparse.Namespace,
    judge: Callable[[report.Sweep], None] = lambda results: None,
) -> int:
    """Runs what is not done, calls `judge` on the rows, reports; returns the exit code.

    0 if every run ended done or diverged, or if the launcher leaves the running to others; else 1.
    """
    from normlab.cli.progress import show_progress
    from normlab.launchers import Rendered

    with sweep.held(folder):
        sweep.write_plan(plan, folder, redo_other_commits=args.redo_other_commits)
        with show_progress(sys.stdout) as progress:
            states = args.launcher(plan, folder, args.jobs, args.threads, progress)
        if isinstance(states, Rendered):
            print(states.path)
            print(states.advice)
            return 0
        judge(report.load(folder))
        results = report.load(folder)
        paths = report.write(folder, results)
    report.show(results, sys.stdout)
    report.show_paths(paths, sys.stdout)
    bad = {run_id: state for run_id, state in states.items() if state not in ("done", "diverged")}
    for run_id, state in bad.items():
        print(f"normlab: run {run_id} {state}; see {folder / run_id / 'log.txt'}", file=sys.stderr)
    return 1 if bad else 0
