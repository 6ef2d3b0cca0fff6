"""`normlab paper`: the experiments of this checkout; run one and keep its page."""

import argparse
from pathlib import Path

from normlab.cli.execute import add_run_arguments
from normlab.cli.sweep import folder_of, run_experiment
from normlab.report.results import Line

HELP = "list the papers' claims with their verdicts; run one and write its page"
TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="none: list them all")
    parser.add_argument("--scale", default="smoke", help="smoke, cpu, cifar, paper (smoke)")
    parser.add_argument("--workdir", metavar="DIR", help="folder of the runs (runs/NAME-SCALE)")
    parser.add_argument(
        "--results", metavar="DIR", help="folder of the pages (experiments/results)"
    )
    parser.add_argument(
        "--readme", action="store_true", help="write experiments/README.md from the results"
    )
    add_run_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Lists the experiments, or runs one and writes its page; returns the exit code."""
    from normlab import report
    from normlab.experiment import experiments_folder, load_experiment
    from normlab.report import results

    kept = Path(args.results or experiments_folder() / "results")
    if args.readme:
        path = experiments_folder() / "README.md"
        path.write_text(results.overview(_lines(), kept), encoding="utf-8")
        print(path)
        return 0
    if args.name is None:
        for line in _lines():
            verdict = results.outcome(kept, line.name, line.scale) or "not run"
            print(f"{line.name:24} {line.scale:7} {verdict:16} {line.cost}")
        return 0
    name, experiment = load_experiment(args.name)
    code = run_experiment(name, experiment, args)
    if code == 0:
        sweep = report.load(folder_of(name, args))
        for path in results.publish(sweep, kept / f"{name}-{args.scale}"):
            if path.suffix not in (".svg", ".pdf"):
                print(path)
    return code


def _lines() -> list[Line]:
    from normlab.experiment import experiment_files, load_experiment

    found = []
    for file in experiment_files():
        name, experiment = load_experiment(str(file))
        for scale in experiment.scales:
            at = experiment.at(scale)
            found.append(Line(name, scale, at.claim, at.cost))
    return found
