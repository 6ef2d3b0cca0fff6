"""`normlab import`: weights that others published, as a checkpoint for `normlab eval`."""

import argparse
from pathlib import Path

HELP = "turn published weights (deepmind-nfnets, timm) into a checkpoint that `eval` reads"
TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("source", metavar="SOURCE", help="deepmind-nfnets or timm")
    parser.add_argument("file", metavar="FILE", help="the weights")
    parser.add_argument("--config", required=True, metavar="FILE.py[:choices]")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a new folder")


def main(args: argparse.Namespace) -> int:
    """Writes the folder and says what is in it; returns 0."""
    from normlab.config import load_config
    from normlab.interop.published import publish

    config = load_config(args.config, args.overrides)
    count = publish(args.source, Path(args.file), config, Path(args.workdir))
    print(f"{count:,} parameters of {config.model.kind} in {args.workdir}, for normlab eval")
    return 0
