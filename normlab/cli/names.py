"""`normlab list`: the names that a config may choose."""

import argparse
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

HELP = "list norms, models, optimizers, convolutions or data sets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    kinds = ("norms", "models", "convs", "optimizers", "data")
    parser.add_argument("kind", choices=kinds, help=", ".join(kinds))
    parser.add_argument("--markdown", action="store_true", help="norms: print docs/normalizers.md")


def main(args: argparse.Namespace) -> int:
    """Prints a line a name, with what it is; returns 0. Normalizers are a table."""
    from normlab.errors import UserError

    if args.markdown and args.kind != "norms":
        raise UserError(f"--markdown is for norms, not {args.kind}")
    if args.markdown:
        print("\n".join(_page()))
    elif args.kind == "norms":
        _print_norms()
    elif args.kind == "data":
        _print_data()
    else:
        _print_classes(args.kind)
    return 0


def _print_data() -> None:
    from normlab.data.info import DATASETS

    for name, info in DATASETS.items():
        shape = "x".join(map(str, info.image_shape))
        print(f"{name:20} {info.num_train} + {info.num_test} images {shape}")


def _print_classes(kind: str) -> None:
    from normlab import models, optim

    registries: dict[str, Mapping[str, Any]] = {
        "models": models.MODELS,
        "convs": models.CONVS,
        "optimizers": optim.OPTIMIZERS,
    }
    width = max(20, *map(len, registries[kind]))
    for name, cls in registries[kind].items():
        print(f"{name:{width}} {_first_line(cls)}")


def _first_line(cls: Any) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


# Normalizers -------------------------------------------------------------------------------------


def _print_norms() -> None:
    from normlab.norms import NORMS
    from normlab.norms.catalogue import HEADER, cells, entries

    found = entries(NORMS)
    header = (*HEADER, "paper")
    rows = [(*cells(entry), entry.paper or "–") for entry in found]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    print("\nLimiting cases:")
    for entry in found:
        for case in entry.facts.equals:
            print(f"  {entry.name} = {case}")


def _page() -> Iterator[str]:
    """Yields the lines of docs/normalizers.md."""
    from normlab.models import CONVS
    from normlab.models.weight_space import DEFINITIONS
    from normlab.norms import NORMS
    from normlab.norms.catalogue import HEADER, cells, entries, source_of

    found = entries(NORMS)
    yield from (
        "# Normalizers",
        "",
        "Made from the modules by `normlab list norms --markdown`; a test keeps it so.",
        "",
        "Chosen by `:norm=NAME` after a config file. x is `[N, H, W, C]`: N H W says that examples",
        "and positions share a statistic, one for each channel; C/G that channels share it in",
        "groups. Which examples N is, `batch_stats.scope` says. State is what training leaves in",
        "`batch_stats`; numbers in shapes are those of the defaults. Passes are the least number",
        "of times that a tensor of x's size is read or written, forward + backward, if a group of",
        "an example fits in a cache and a batch does not.",
        "",
    )
    rows = [(f"[{e.name}](#{e.name})", *cells(e)[1:], _paper(e.paper, e.arxiv)) for e in found]
    yield from _table((*HEADER, "paper"), rows)
    yield from (
        "",
        "## Limiting cases",
        "",
        "Each is a test, with an input where it does not hold.",
    )
    yield ""
    yield from (f"* `{e.name}` = {case}" for e in found for case in e.facts.equals)
    yield from (
        "",
        "## Weight space",
        "",
        "Chosen by `:conv=NAME`, with any normalizer. Statistics are over the fan-in of a unit.",
        "",
    )
    files = {
        name: inspect.getdoc(inspect.getmodule(DEFINITIONS[cls])) or ""
        for name, cls in CONVS.items()
        if cls in DEFINITIONS
    }
    weights = [
        (f"`{name}`", _first_line(CONVS[name]), _paper(*source_of(text)))
        for name, text in files.items()
    ]
    yield from _table(("convolution", "weights", "paper"), weights)
    yield from ("", "# Definitions")
    for entry in found:
        yield from ("", f"## {entry.name}", "", *entry.text.splitlines())
    for name, text in files.items():
        yield from ("", f"## {name}", "", *text.splitlines())


def _paper(paper: str, number: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{number})" if number else "–"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
