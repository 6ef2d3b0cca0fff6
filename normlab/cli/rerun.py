"""`normlab rerun`: the run of a folder once more, from its config, in another folder."""

import argparse
import sys
from pathlib import Path
from typing import Any

HELP = "train a run's config again in another folder, and say what is not as it was then"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("directory", metavar="DIR", help="a run's folder")
    parser.add_argument("--workdir", required=True, metavar="NEW", help="folder of the new run")
    parser.add_argument("--data-path", metavar="PATH", help="where the data set is now")


def main(args: argparse.Namespace) -> int:
    """Warns of what differs, trains, compares; returns the exit code of `train`."""
    from normlab import run
    from normlab.cli.train import train_and_print
    from normlab.config import from_json
    from normlab.errors import UserError
    from normlab.training.record import describe_process

    folder = Path(args.directory)
    saved, then = (run.read_json(folder / f"{name}.json") for name in ("config", "manifest"))
    if saved is None or then is None:
        missing = "config.json" if saved is None else "manifest.json"
        raise UserError(f"{str(folder)!r} is not a run folder: it has no {missing}")
    config = from_json(saved)
    if args.data_path is not None:
        config.data.path = args.data_path
    for name, (old, new) in differences(then, describe_process()).items():
        print(f"normlab: not as then: {name} was {old}, is {new}", file=sys.stderr)
    code = train_and_print(config, args.workdir, {})
    before, after = (run.read_result(Path(path)) for path in (folder, args.workdir))
    if before and after:
        print(f"test accuracy {before['test_accuracy']} then, {after['test_accuracy']} now")
    return code


def differences(then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns {what: (then, now)} of what two runs stand on: code, versions, machine."""
    names = ("git_commit", "git_dirty", "python", "platform", "cpu", "devices", "threads")
    pairs = {name: (then.get(name), now.get(name)) for name in names}
    for section in ("versions", "environment"):
        a, b = then.get(section) or {}, now.get(section) or {}
        pairs |= {f"{section}.{name}": (a.get(name), b.get(name)) for name in {**a, **b}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
