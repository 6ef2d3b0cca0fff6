"""`normlab paper`: the experiments of this checkout; run one and keep its page."""

import argparse
from pathlib import Path

from normlab.cli.execute import add_run_arguments
from normlab.cli.sweep import folder_of, run_experiment
from normlab.errors import UserError
from normlab.experiment import Scale
from normlab.report.results import Line

HELP = "list the papers' claims with their verdicts; run one and write its page"
TAKES_CONFIG = True

OF_A_RUN = {"scale": "smoke", "threads": 1, "launcher": "local"}
"""Defaults that hold where an experiment is run; elsewhere the options are refused."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="none: list them all")
    parser.add_argument("--scale", help="smoke, cpu, cifar, paper (smoke)")
    parser.add_argument("--workdir", metavar="DIR", help="folder of the runs (runs/NAME-SCALE)")
    parser.add_argument(
        "--results", metavar="DIR", help="folder of the pages (experiments/results)"
    )
    parser.add_argument(
        "--readme", action="store_true", help="write experiments/README.md from the results"
    )
    add_run_arguments(parser)
    parser.set_defaults(**dict.fromkeys(OF_A_RUN))


def main(args: argparse.Namespace) -> int:
    """Lists the experiments, or runs one and writes its page; returns the exit code."""
    from normlab import report
    from normlab.experiment import experiments_folder, load_experiment
    from normlab.report import results
    from normlab.run import write_text

    kept = Path(args.results or experiments_folder() / "results")
    if args.readme:
        _refuse(args, "--readme", "name", "results")
        path = experiments_folder() / "README.md"
        write_text(path, results.overview(_lines(), kept))
        print(path)
        return 0
    if args.name is None:
        _refuse(args, "a list of all")
        for line in _lines():
            verdict = results.outcome(kept, line.name, line.scale) or "not run"
            print(
                f"{line.name:24} {line.scale:7} {verdict:16} {line.cost:32} {line.options}".rstrip()
            )
        return 0
    for option, value in OF_A_RUN.items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    name, experiment = load_experiment(args.name)
    code = run_experiment(name, experiment, args)
    if code == 0:
        sweep = report.load(folder_of(name, args))
        for path in results.publish(sweep, kept / f"{name}-{args.scale}"):
            if path.suffix not in (".svg", ".pdf"):
                print(path)
    return code


def _refuse(args: argparse.Namespace, what: str, *further: str) -> None:
    """Raises UserError for an argument that says how to run an experiment where none is run."""
    names = (*further, "scale", "workdir", "seeds", "jobs", "threads", "redo_other_commits")
    names += ("deterministic", "launcher")
    for name in names:
        value = getattr(args, name)
        if value is not None and value is not False:
            option = f"--{name.replace('_', '-')}"
            text = option if value is True else f"{option}={value}"
            given = repr(value) if name == "name" else text
            raise UserError(f"{given} has no meaning for {what}; leave it out")
    for name, value in args.overrides.items():
        raise UserError(f"--config.{name}={value} has no meaning for {what}; leave it out")


def _lines() -> list[Line]:
    from normlab.experiment import experiment_files, load_experiment

    found = []
    for file in experiment_files():
        name, experiment = load_experiment(str(file))
        for scale in experiment.scales:
            at = experiment.at(scale)
            found.append(Line(name, scale, at.claim, at.cost, _options(at)))
    return found


def _options(scale: Scale) -> str:
    """Returns what a person must add to the command: the data, where they lie on disk."""
    from normlab.config import load_config

    # Other overrides may be of a normalizer that this config does not have by itself.
    of_data = {name: x for name, x in scale.overrides.items() if name.startswith("data.")}
    data = load_config(scale.config, of_data).data
    on_disk = data.source in ("archive", "tfds", "folder")
    return "--config.data.path=PATH" if on_disk and data.path is None else ""
