"""`normlab bench norms`: how fast the normalizers are, beside a copy and beside PyTorch."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from normlab.errors import UserError, unknown

HELP = "time the normalizers, forward and backward, beside a plain copy of their input"
_CONTENDERS = ("torch",)
_CLOCKS = ("wall", "cpu")
_DTYPES = ("float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("what", metavar="norms", help="what is timed: norms")
    parser.add_argument("--norms", metavar="A,B", help="which normalizers (all)")
    parser.add_argument(
        "--shapes", metavar="A,B", help="names, or sizes with channels last as 8x4x4x16 (all names)"
    )
    parser.add_argument("--dtype", default="float32", help="of the input: float32 or bfloat16")
    parser.add_argument("--rounds", type=int, default=11, help="turns of each contender (11)")
    parser.add_argument(
        "--clock", default="wall", help="wall, or cpu for a busy machine (then best with NPROC=1)"
    )
    parser.add_argument("--against", metavar="torch", help="time PyTorch's counterparts, too")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures there")
    parser.add_argument("--markdown", action="store_true", help="print tables for a page")


def main(args: argparse.Namespace) -> int:
    """Prints a table a shape, as soon as it is measured; returns 0."""
    _check(args)
    from normlab.analysis import pytorch, speed
    from normlab.norms import NORMS
    from normlab.report.drawing import markdown_table, say, show
    from normlab.run import describe_machine

    names = args.norms.split(",") if args.norms else list(NORMS)
    for name in names:
        if name not in NORMS:
            raise unknown("norm", name, NORMS)
    texts = args.shapes.split(",") if args.shapes else list(speed.SHAPES)
    shapes = {text: speed.parse_shape(text) for text in texts}
    machine = describe_machine()
    if args.against:
        machine["versions"]["torch"] = pytorch.require()
    say(f"{_machine_line(machine)}; {args.clock} clock", sys.stdout)
    measured = []
    for name, shape in shapes.items():
        rows = speed.measure(
            names,
            name,
            shape,
            args.dtype,
            args.rounds,
            torch=bool(args.against),
            clock=args.clock,
        )
        measured += rows
        heading = f"{name}, {'×'.join(map(str, shape))} {args.dtype}"
        say(f"\n### {heading}\n" if args.markdown else f"\n{heading}", sys.stdout)
        table = speed.table(rows)
        if args.markdown:
            say(markdown_table(table), sys.stdout)
        else:
            show(table, sys.stdout)
        sys.stdout.flush()
    if args.json:
        figures = {
            "machine": machine,
            "clock": args.clock,
            "rows": [row.figures() for row in measured],
        }
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.what != "norms":
        raise unknown("benchmark", args.what, ("norms",))
    if args.dtype not in _DTYPES:
        raise unknown("dtype", args.dtype, _DTYPES)
    if args.clock not in _CLOCKS:
        raise unknown("clock", args.clock, _CLOCKS)
    if args.against is not None and args.against not in _CONTENDERS:
        raise unknown("contender", args.against, _CONTENDERS)
    if args.rounds < 1:
        raise UserError(f"--rounds={args.rounds} must be 1 or more")
    if args.json is not None and args.json.exists():
        raise UserError(f"--json={args.json} exists; name another file")
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json={args.json}: there is no folder {str(args.json.parent)!r}")


def _machine_line(machine: dict[str, Any]) -> str:
    versions = machine["versions"]
    known = [f"{name} {versions[name]}" for name in ("jax", "torch") if versions.get(name)]
    commit = (machine["git_commit"] or "unknown")[:7] + ("+" if machine["git_dirty"] else "")
    parts = [machine["cpu"], f"{machine['threads']} threads", *known, f"commit {commit}"]
    return ", ".join(parts)
