"""`normlab sweep`: an experiment's runs at a scale, the table, the verdict."""

import argparse
from pathlib import Path

from normlab.cli.execute import add_run_arguments, check_run_arguments, execute
from normlab.experiment import Experiment

HELP = "run an experiment at a scale, and report with the paper's numbers and a verdict"
TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "experiment", metavar="FILE.py", help="e.g. experiments/batch_norm_mnist.py"
    )
    parser.add_argument("--scale", default="smoke", help="smoke, cpu, cifar, paper (smoke)")
    parser.add_argument("--workdir", metavar="DIR", help="folder of the runs (runs/NAME-SCALE)")
    add_run_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Plans, runs what is not done, judges, reports; returns 0 if every run ended well."""
    from normlab.experiment import load_experiment

    name, experiment = load_experiment(args.experiment)
    return run_experiment(name, experiment, args)


def folder_of(name: str, args: argparse.Namespace) -> Path:
    """Returns where an experiment's runs go."""
    return Path(args.workdir or f"runs/{name}-{args.scale}")


def run_experiment(name: str, experiment: Experiment, args: argparse.Namespace) -> int:
    """Does what `main` says for an experiment that is loaded."""
    from normlab import run, sweep
    from normlab.experiment import check_verdict
    from normlab.report import verdict

    check_run_arguments(args)
    scale = experiment.at(args.scale)
    folder = folder_of(name, args)
    assert scale.sweep is not None
    assert scale.seeds is not None
    plan = sweep.make_plan(
        scale.config,
        scale.sweep,
        seeds=range(args.seeds or scale.seeds),
        overrides=args.overrides,
        declared=scale.overrides,
        experiment=experiment.facts(name, args.scale),
    )
    check_verdict(scale.verdict, [(x.labels["norm"], x.labels["setting"]) for x in plan.runs])

    def judge(results: verdict.Sweep) -> None:
        assert scale.verdict is not None
        found = verdict.judge(scale.verdict, results)
        run.write_json(folder / run.VERDICT, verdict.as_json(found, results, experiment.quantities))

    return execute(plan, folder, args, judge)
