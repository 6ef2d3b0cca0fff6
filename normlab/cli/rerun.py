"""`normlab rerun`: the run of a folder once more, from its config, in another folder."""

import argparse
import sys
from pathlib import Path
from typing import Any

from normlab.cli import add_deterministic
from normlab.errors import UserError

HELP = "train a run's config again in another folder, and say what is not as it was then"

_FACTS = ("git_commit", "git_dirty", "python", "platform", "cpu", "devices", "threads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("directory", metavar="DIR", help="a run's folder")
    parser.add_argument("--workdir", required=True, metavar="NEW", help="folder of the new run")
    parser.add_argument("--data-path", metavar="PATH", help="where the data set is now")
    add_deterministic(parser)


def main(args: argparse.Namespace) -> int:
    """Warns of what differs, trains, compares; returns the exit code of `train`."""
    from normlab import run
    from normlab.cli.train import train_and_print
    from normlab.data import load
    from normlab.training.record import describe_process
    from normlab.training.restore import saved_config

    folder = Path(args.directory)
    config, then = saved_config(folder), run.read_json(folder / "manifest.json")
    if then is None:
        raise UserError(f"{str(folder)!r} is not a run folder: it has no manifest.json")
    check_new(folder, Path(args.workdir))
    _check_sections(then, folder / "manifest.json")
    if args.data_path is not None:
        config.data.path = args.data_path
    now = describe_process() | {"data_fingerprint": load(config.data).fingerprint}
    for warning in warnings(then, now):
        print(f"normlab: not as then: {warning}", file=sys.stderr)
    code = train_and_print(config, args.workdir, {})
    before, after = (run.read_result(Path(path)) for path in (folder, args.workdir))
    if before and after:
        print(f"test accuracy {before['test_accuracy']} then, {after['test_accuracy']} now")
    return code


def check_new(folder: Path, new: Path) -> None:
    """Raises UserError if `new` is the run's own folder or holds a finished run."""
    from normlab import run

    if new.resolve() == folder.resolve():
        raise UserError(f"--workdir={str(new)!r} is the folder of the run itself; choose another")
    if new.is_dir() and run.read_result(new) is not None:
        raise UserError(f"--workdir={str(new)!r} holds a finished run; choose another folder")


def warnings(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns a line for each difference in what two runs stand on: code, versions, machine, data.

    `then` and `now` are manifests. A version that was not recorded then is none.
    """
    pairs = {name: (then.get(name), now.get(name)) for name in (*_FACTS, "data_fingerprint")}
    a, b = then.get("versions") or {}, now.get("versions") or {}
    pairs |= {f"versions.{name}": (a[name], b.get(name)) for name in a}
    a, b = then.get("environment") or {}, now.get("environment") or {}
    pairs |= {f"environment.{name}": (a.get(name), b.get(name)) for name in {**a, **b}}
    found = [f"{name} was {old}, is {new}" for name, (old, new) in pairs.items() if old != new]
    dirty, commit = pairs["git_dirty"], pairs["git_commit"]
    if dirty == (True, True) and commit[0] == commit[1]:
        found.insert(0, f"commit {commit[0]}, with uncommitted changes, which cannot be compared")
    return found


def _check_sections(manifest: dict[str, Any], path: Path) -> None:
    for name in ("versions", "environment"):
        if not isinstance(manifest.get(name, {}), dict):
            raise UserError(f"{path} is damaged: {name!r} is no object")
