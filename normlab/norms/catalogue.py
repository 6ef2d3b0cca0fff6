"""One table of all normalizers, made from the modules: `normlab list norms`, docs/normalizers.md.

State and parameters are read off a module's initialization, the paper off its file's first words,
the rest off its `facts`.
"""

import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict

from normlab.norms.normalizer import Facts, LayerBefore, Normalizer

_SHAPE = (2, 11, 13, 320)
_LETTERS = {11: "H", 13: "W", 17: "inputs", 320: "C", 20: "C/16", 5: "C/64"}

_SOURCE = re.compile(r"(?P<paper>[^.]+?(?: et al\.)? \d{4}), arXiv:(?P<number>[\d.]+\d)")


class Entry(NamedTuple):
    """What the table says of one normalizer."""

    name: str  # config name
    facts: Facts
    state: tuple[str, ...]  # entries of batch_stats, with their shapes
    parameters: tuple[str, ...]  # with their shapes, as the class starts
    paper: str  # authors and year; "" for none
    arxiv: str  # number
    text: str  # the docstring of its file


def entries(norms: Mapping[str, type[Normalizer]]) -> list[Entry]:
    """Returns an entry for each normalizer, by config name, in the order of the registry."""
    return [_entry(name, cls) for name, cls in norms.items()]


def _entry(name: str, cls: type[Normalizer]) -> Entry:
    x = jax.ShapeDtypeStruct(_SHAPE, jnp.float32)
    fields: dict[str, Any] = {"activation": nn.relu} if cls.replaces_activation else {}
    module = cls(**fields)
    call: dict[str, Any] = {"train": True}
    if cls.needs_layer:
        call["layer"] = LayerBefore(jnp.zeros((17, _SHAPE[-1])), lambda kernel: kernel)
    variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, **call), x)
    text = inspect.getdoc(inspect.getmodule(cls)) or ""
    paper, number = source_of(text)
    return Entry(
        name=name,
        facts=cls.facts,
        state=_shapes(variables.get("batch_stats", {})),
        parameters=_shapes(variables.get("params", {})),
        paper=paper,
        arxiv=number,
        text=text,
    )


def source_of(text: str) -> tuple[str, str]:
    """Returns (authors and year, arXiv number) of the first paper that a docstring names."""
    source = _SOURCE.search(" ".join(text.split()))
    return (source["paper"].strip(), source["number"]) if source else ("", "")


def _shapes(tree: Any) -> tuple[str, ...]:
    """Returns "mean [C]" and so on; an axis of H, W or C is called so."""
    return tuple(
        f"{name} [{', '.join(_LETTERS.get(size, str(size)) for size in leaf.shape)}]"
        for name, leaf in flatten_dict(tree, sep="/").items()
    )


HEADER = ("normalizer", "shares statistics over", "state", "parameters", "at inference", "passes")


def cells(entry: Entry) -> tuple[str, ...]:
    """Returns an entry's cells under `HEADER`."""
    passes = entry.facts.passes
    return (
        entry.name,
        entry.facts.over or "–",
        ", ".join(entry.state) or "–",
        ", ".join(entry.parameters) or "–",
        entry.facts.at_inference,
        f"{passes[0]} + {passes[1]}" if passes else "–",
    )
