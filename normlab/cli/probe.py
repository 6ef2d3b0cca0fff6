"""`normlab probe`: how signals and gradients spread with depth, at the start or at a checkpoint."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from normlab.errors import UserError, unknown

HELP = "show how signals or gradients spread with depth, as table, data and figure"
TAKES_CONFIG = True
PROBES = ("signals", "gradients")
STATISTICS = ("batch", "running")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("what", metavar="NAME", help=f"what is probed: {', '.join(PROBES)}")
    parser.add_argument(
        "--config", metavar="FILE.py[:choices]", help="the model of a config, as it starts"
    )
    parser.add_argument("--run", metavar="RUN", help="the model of a run's checkpoint")
    parser.add_argument("--step", type=int, help="the checkpoint's step (the newest good one)")
    parser.add_argument(
        "--weights", choices=("ema", "raw"), help="which weights (as the config's eval.use_ema)"
    )
    parser.add_argument("--data-path", metavar="PATH", help="where the run's data set is now")
    parser.add_argument(
        "--input",
        metavar="KIND",
        help="gaussian: every value N(0, 1) (of --config); data: of the training set (of --run)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="initial values and batches drawn (3)")
    parser.add_argument(
        "--by", metavar="KIND", help="blocks or layers (blocks, where a model has residual ones)"
    )
    parser.add_argument(
        "--statistics", default="batch", help="that normalizers use: batch (as training) or running"
    )
    parser.add_argument(
        "--objective",
        metavar="KIND",
        help="gradients of: loss, or functional, a random linear one of the logits (loss)",
    )
    parser.add_argument(
        "--workdir", metavar="DIR", help="a new folder for NAME.json, .csv, .svg and .pdf (none)"
    )


def main(args: argparse.Namespace) -> int:
    """Prints the table; writes only where --workdir says. Returns 0."""
    _check(args)
    from normlab.analysis.gradients import measure_gradients
    from normlab.analysis.signals import measure_signals
    from normlab.report.drawing import say, show
    from normlab.report.profiles import table, write
    from normlab.report.tables import NOTHING

    how: dict[str, Any] = {"by": args.by, "batch_statistics": args.statistics == "batch"}
    if args.what == "gradients":
        how["objective"] = args.objective or "loss"
    measure = {"signals": measure_signals, "gradients": measure_gradients}[args.what]
    subject = _subject(args)
    with _new_folder(args.workdir) as folder:  # refused before anything is computed
        profile = measure(subject, **how)
    say(", ".join(f"{name} {value}" for name, value in profile.subject.items()), sys.stdout)
    show(table(profile), sys.stdout)
    for name, value in profile.summary.items():
        said = f"{value:.4g}" if isinstance(value, float) else value or NOTHING
        say(f"{name}: {said}", sys.stdout)
    if folder is not None:
        for path in write(profile, folder):
            say(str(path), sys.stdout)
    return 0


@contextmanager
def _new_folder(workdir: str | None) -> Iterator[Path | None]:
    """Makes the folder, and takes it away again, with the parents made for it, after an error."""
    if workdir is None:
        yield None
        return
    folder = Path(workdir)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"workdir {workdir!r} cannot be written: {reason}") from error
    try:
        yield folder
    except BaseException:
        for path in made:
            path.rmdir()
        raise


def _subject(args: argparse.Namespace) -> Any:
    from normlab.analysis.subject import fresh, of_run
    from normlab.config import load_config

    if args.run is None:
        config = load_config(args.config, args.overrides)
        return fresh(config, num_seeds=args.seeds, inputs=args.input or "gaussian")
    return of_run(
        Path(args.run),
        step=args.step,
        use_ema=None if args.weights is None else args.weights == "ema",
        data_path=args.data_path,
        num_seeds=args.seeds,
        inputs=args.input or "data",
    )


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for what can be refused before anything is loaded."""
    if args.what not in PROBES:
        raise unknown("probe", args.what, PROBES)
    if (args.config is None) == (args.run is None):
        raise UserError("a probe takes either --config=FILE.py[:choices] or --run=RUN")
    of_a_run = {"--step": args.step, "--weights": args.weights, "--data-path": args.data_path}
    given = [name for name, value in of_a_run.items() if value is not None]
    if args.run is None and given:
        raise UserError(f"{given[0]} is of a run's checkpoint; give it with --run=RUN")
    if args.run is not None and args.overrides:
        raise UserError(f"--config.{next(iter(args.overrides))} has no place beside --run")
    if args.statistics not in STATISTICS:
        raise unknown("kind of statistics", args.statistics, STATISTICS)
    if args.objective is not None and args.what != "gradients":
        raise UserError("--objective is of the probe 'gradients'")
    if args.workdir is not None and Path(args.workdir).exists():
        raise UserError(f"workdir {args.workdir!r} exists; choose a new folder")
