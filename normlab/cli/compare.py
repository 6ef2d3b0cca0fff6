"""`normlab compare`: normalizers × settings × seeds, and the table."""

import argparse
import re
import sys
from pathlib import Path

from normlab.errors import UserError

HELP = "compare normalizers over settings and seeds, and write the report"
TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("config", metavar="FILE.py[:choices]", help="e.g. configs/digits.py")
    parser.add_argument("--norms", required=True, help="comma-separated, e.g. none,batch_norm")
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="NAME:field=value,...",
        help="a named set of overrides, repeatable; e.g. --setting='lr x5:optim.base_lr=0.5'",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (3)")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the comparison")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time (one a core; on a GPU one)"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads a run (1)")
    parser.add_argument(
        "--redo-other-commits",
        action="store_true",
        help="run again what another commit of normlab ran; the old run is kept aside",
    )


def main(args: argparse.Namespace) -> int:
    """Plans, runs what is not done, reports; returns 0 if every run ended done or diverged."""
    from normlab import pool, report, sweep
    from normlab.cli.progress import show_progress

    settings = dict(_setting(text) for text in args.setting) or {"base": {}}
    if len(settings) < len(args.setting):
        raise UserError("two settings have the same name")
    for name, value in (("seeds", args.seeds), ("jobs", args.jobs), ("threads", args.threads)):
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} must be 1 or more")
    plan = sweep.make_plan(
        args.config,
        norms=[name for name in args.norms.split(",") if name],
        settings=settings,
        seeds=range(args.seeds),
        overrides=args.overrides,
    )
    folder = Path(args.workdir)
    with sweep.held(folder):
        sweep.write_plan(plan, folder, redo_other_commits=args.redo_other_commits)
        with show_progress(sys.stdout) as progress:
            states = pool.run_plan(plan, folder, args.jobs, args.threads, progress)
    results = report.load(folder)
    paths = report.write(folder, results)
    report.show(results, sys.stdout)
    for path in paths:
        print(path)
    bad = {run_id: state for run_id, state in states.items() if state not in ("done", "diverged")}
    for run_id, state in bad.items():
        print(f"normlab: run {run_id} {state}; see {folder / run_id / 'log.txt'}", file=sys.stderr)
    return 1 if bad else 0


def _setting(text: str) -> tuple[str, dict[str, str]]:
    """Returns (name, overrides) of `NAME:field=value,field=value`."""
    name, _, rest = text.partition(":")
    if not name.strip():
        raise UserError(f"--setting={text!r} has no name; write NAME:field=value,...")
    overrides = {}
    # A comma inside brackets belongs to a tuple.
    for part in filter(None, re.split(r",(?![^(\[]*[)\]])", rest)):
        field, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"--setting={text!r}: {part!r} is not field=value")
        name_of_field = field.strip().removeprefix("config.")
        if name_of_field in overrides:
            raise UserError(f"--setting={text!r} gives {name_of_field!r} twice")
        overrides[name_of_field] = value.strip()
    return name.strip(), overrides
