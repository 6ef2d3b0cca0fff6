"""`normlab inspect`: what a config is, before anything is computed."""

import argparse
from collections.abc import Sequence
from typing import Any

HELP = "show every resolved field, the parameters and the normalizers by layer; computes nothing"
TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("--config", required=True, metavar="FILE.py[:choices]")
    parser.add_argument(
        "--agc", action="store_true", help="show only what adaptive clipping does to each parameter"
    )
    parser.add_argument(
        "--against", metavar="FILE.py[:choices]", help="show only what differs from another config"
    )
    parser.add_argument(
        "--communication",
        type=int,
        metavar="N",
        help="show only what N devices tell each other in a step of training",
    )


def main(args: argparse.Namespace) -> int:
    """Prints the tables; returns 0."""
    import math

    from normlab import models, optim
    from normlab.config import field_type, flatten, load_config
    from normlab.meanings import field_meanings
    from normlab.models.layers import norm_layers
    from normlab.training.setup import build_parts, id_of

    config = load_config(args.config, args.overrides)
    parts = build_parts(config, need_data=False)
    if args.against is not None:
        other = load_config(args.against)
        build_parts(other, need_data=False)
        _print_difference(other, config)
        return 0
    if args.agc:
        _print_agc(config, parts.abstract_variables()["params"])
        return 0
    if args.communication is not None:
        _print_communication(config, args.communication)
        return 0
    meaning = field_meanings(config)

    print(f"run {id_of(config)}\n")
    rows = []
    for name, value in flatten(config).items():
        section, _, key = name.rpartition(".")
        kind, may_be_none = field_type(config[section] if section else config, key)
        type_name = kind.__name__ + (" or none" if may_be_none else "")
        rows.append((name, _text(value), type_name, meaning.get(name, "")))
    _print_table(("field", "value", "type", "meaning"), rows)

    length = parts.length
    print(
        f"\n{length.num_steps} steps of {length.batch_size} examples, "
        f"{length.steps_per_epoch} steps an epoch; "
        f"peak learning rate {optim.peak_learning_rate(config):g}"
    )
    params = parts.abstract_variables()["params"]
    print(f"{models.count_params(params):,} parameters")
    print(_cost(parts.model, parts.info.image_shape) + "\n")
    roles = _flat(optim.roles(params))
    decayed = _flat(optim.role_mask(params, config.optim.decay_roles))
    decays = config.optim.weight_decay > 0
    parameters = [
        (
            name,
            "×".join(map(str, leaf.shape)) or "scalar",
            f"{math.prod(leaf.shape):,}",
            roles[name],
            "yes" if decays and decayed[name] else "no",
        )
        for name, leaf in _flat(params).items()
    ]
    _print_table(("parameter", "shape", "numbers", "role", "decayed"), parameters)

    layers = norm_layers(parts.model, parts.info.image_shape)
    norms = [(x.path, x.kind, "×".join(map(str, x.shape)), x.note) for x in layers]
    print()
    _print_table(("normalizer", "kind", "input", "note"), norms)
    print()
    _print_memory(parts)
    return 0


def _print_agc(config: Any, params: Any) -> None:
    from normlab import optim

    clipping = config.optim.agc_clipping
    if clipping is None:
        print(
            "config field 'optim.agc_clipping' is none: nothing is clipped; with 0.01 it would be"
        )
    found = optim.units(params, clipping or 0.01, **optim.agc_settings(config))
    shapes = _flat(params)
    rows = [
        (
            path,
            "×".join(map(str, shapes[path].shape)) or "scalar",
            "–" if unit.clipping is None else ", ".join(map(str, unit.axes)) or "none",
            "excluded" if unit.clipping is None else f"{unit.clipping:g}",
            unit.why,
        )
        for path, unit in found.items()
    ]
    _print_table(("parameter", "shape", "norm over axes", "clipping", "why"), rows)


def _print_communication(config: Any, devices: int) -> None:
    from normlab.analysis.communication import NETWORKS, Volume, of_step

    volumes = of_step(config, devices)
    volumes["all"] = sum(volumes.values(), Volume())
    rows = [
        (what, str(volume.rounds), f"{volume.payload:,}", f"{volume.sent:,.0f}")
        for what, volume in volumes.items()
    ]
    header = ("a step, each device", "rounds", "bytes of its own", "bytes sent over a ring")
    _print_table(header, rows)
    networks = [network for network in NETWORKS if network.devices == devices]
    for network in networks:
        times = ", ".join(
            f"{what} {1e3 * network.seconds(volume):.2f} ms" for what, volume in volumes.items()
        )
        print(f"{network.name} (a model, no measurement): {times}")


def _print_memory(parts: Any) -> None:
    from normlab.training.memory import LEFT_OUT, estimate

    rows = [(what, f"{size / 2**20:9,.2f}") for what, size in estimate(parts).items()]
    _print_table(("memory of a training step, a device", "      MiB"), rows)
    print(LEFT_OUT)


def _print_difference(there: Any, here: Any) -> None:
    """Prints the fields in which two configs differ, and their values; "–" where one has none."""
    from normlab.config import flatten

    a, b = flatten(there), flatten(here)
    rows = [
        (name, _text(a[name]) if name in a else "–", _text(b[name]) if name in b else "–")
        for name in dict.fromkeys([*b, *a])
        if name != "source" and (name not in a or name not in b or a[name] != b[name])
    ]
    if rows:
        _print_table(("field", there.source, here.source), rows)
    else:
        print("the same in every field")


def _cost(model: Any, image_shape: tuple[int, ...]) -> str:
    from normlab.models.cost import macs, xla_flops

    flops = xla_flops(model, image_shape)
    beside = "" if flops is None else f"; XLA counts {flops:,.0f} operations, a loop's once"
    return f"{macs(model, image_shape):,} multiply-accumulates an image{beside}"


def _flat(tree: Any) -> dict[str, Any]:
    from flax import traverse_util

    return traverse_util.flatten_dict(tree, sep="/")


def _text(value: Any) -> str:
    return "none" if value is None else str(value)


def _print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Prints aligned columns; the last one is as wide as it is."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
