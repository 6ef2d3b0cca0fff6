"""`normlab data`: is a data set what it should be, how does a model see it, in another form."""

import argparse
import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from normlab.errors import UserError, printable

HELP = "verify data on disk, show samples as the model gets them, write a TFDS directory"
TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the actions and their arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    info = actions.add_parser("info", help="facts, and a sheet of samples, augmentation included")
    info.add_argument("--config", required=True, metavar="FILE.py[:choices]")
    info.add_argument("--sheet", type=Path, metavar="FILE.png", help="the picture (NAME-sheet.png)")
    info.add_argument("--classes", type=int, default=10, metavar="N", help="rows at most (10)")
    info.add_argument("--samples", type=int, default=8, metavar="N", help="images of a class (8)")
    verify = actions.add_parser("verify", help="name each file whose size or checksum is wrong")
    prepare = actions.add_parser("prepare", help="write a directory of tensorflow-datasets")
    for action in (verify, prepare):
        action.add_argument("name", metavar="NAME", help="the data set, as `normlab list data`")
        action.add_argument("--path", metavar="PATH", help="archive, folder of images or TFDS")
        action.add_argument(
            "--source", choices=("archive", "tfds", "folder"), help="what PATH is (by a look at it)"
        )
    prepare.add_argument("--to", required=True, type=Path, metavar="DIR", help="the TFDS directory")


def main(args: argparse.Namespace) -> int:
    """Runs the action; returns 0, or 2 if `verify` found a fault."""
    if args.overrides and args.action != "info":
        raise UserError(f"unknown argument '--config.{next(iter(args.overrides))}'")
    return {"info": _info, "verify": _verify, "prepare": _prepare}[args.action](args)


def _verify(args: argparse.Namespace) -> int:
    from normlab.data import describe
    from normlab.data.verify import verify

    config = _data_config(args)
    source = config.source
    if source == "sklearn":
        raise UserError("data set 'digits' comes with scikit-learn; there is no file to verify")
    info = describe(config)
    wrong = 0
    for found in verify(args.name, source, config.path):
        wrong += bool(found.fault)
        facts = [] if found.size is None else [f"{found.size:,} bytes", f"MD5 {found.md5}"]
        verdict = f"WRONG: {found.fault}" if found.fault else found.verdict
        words = [found.file, *facts, *filter(None, [verdict, found.note])]
        print("  ".join(map(printable, words)))
    lacking = _lacking(info)
    good = f"nothing is wrong with what is there; {lacking}" if lacking else "nothing is wrong"
    print(f"{args.name} ({source}): " + (f"{wrong} wrong" if wrong else good))
    return UserError.exit_code if wrong else 0


def _lacking(info: Any) -> str:
    """Returns how many images are there of a known data set's, "" if they are as many."""
    from normlab.data import DATASETS

    official = DATASETS.get(info.name, info)
    counts = [
        f"{there:,} of {full:,} {what} images"
        for what, there, full in (
            ("training", info.num_train, official.num_train),
            ("test", info.num_test, official.num_test),
        )
        if there != full
    ]
    return ", ".join(counts)


def _prepare(args: argparse.Namespace) -> int:
    from normlab.data import archive, load
    from normlab.data.prepare import target, write, write_by_catalogue

    target(args.name, args.to)
    is_folder = args.path is not None and (Path(args.path) / "train").is_dir()
    with _raising_at_signals():
        if args.name != "digits" and args.name not in archive.LAYOUTS and not is_folder:
            folder = write_by_catalogue(args.name, Path(_path(args)), args.to)
        else:
            folder = write(load(_data_config(args)), args.to)
    print(f"{folder}")
    print(f"read it with --config.data.source=tfds --config.data.path={args.to}")
    return 0


@contextlib.contextmanager
def _raising_at_signals() -> Iterator[None]:
    """In the block Ctrl-C and SIGTERM raise, so that what is half written is removed."""

    def leave(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: leave}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _data_config(args: argparse.Namespace) -> Any:
    """Returns `config.data` for the data set that the arguments name."""
    from normlab.config import load_config
    from normlab.data.verify import guess_source

    data = load_config("configs/base.py").data
    data.name, data.path = args.name, args.path
    if args.name != "digits" or args.path is not None:
        data.source = args.source or guess_source(args.name, _path(args))
    return data


def _info(args: argparse.Namespace) -> int:
    from normlab.config import load_config
    from normlab.training.sheet import check_path, draw_sheet, save_sheet

    for name in ("classes", "samples"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} must be 1 or more")
    config = load_config(args.config, args.overrides)
    path = args.sheet or Path(f"{config.data.name}-sheet.png")
    check_path(path)
    facts, sheet = draw_sheet(config, args.classes, args.samples)
    save_sheet(sheet, path)
    for name, value in facts.items():
        print(f"{name:20} {value}")
    print(path)
    return 0


def _path(args: argparse.Namespace) -> str:
    if args.path is None:
        raise UserError(f"'normlab data {args.action}' needs --path=PATH")
    return args.path
