"""`normlab compare`: normalizers × settings × seeds, and the table."""

import argparse
import re
from pathlib import Path

from normlab.cli.execute import add_run_arguments, check_run_arguments, execute
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
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the comparison")
    add_run_arguments(parser)
    parser.set_defaults(seeds=3)


def main(args: argparse.Namespace) -> int:
    """Plans, runs what is not done, reports; returns 0 if every run ended done or diverged."""
    from normlab import grid, sweep

    settings = dict(_setting(text) for text in args.setting) or {"base": {}}
    if len(settings) < len(args.setting):
        raise UserError("two settings have the same name")
    check_run_arguments(args)
    norms = dict.fromkeys(name for name in args.norms.split(",") if name)
    if not norms:
        raise UserError("--norms names no normalizer")
    varied = grid.settings(settings) * grid.grid({"norm": norms})
    plan = sweep.make_plan(args.config, varied, seeds=range(args.seeds), overrides=args.overrides)
    return execute(plan, Path(args.workdir), args)


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
