"""The table of all normalizers says what is so."""

import jax
import pytest
from flax import linen as nn

from normlab.norms import NORMS
from normlab.norms.catalogue import cells, entries, source_of

FIELDS = {
    "group_norm": {"num_groups": 2},
    "batch_group_norm": {"num_groups": 2},
    "evonorm_s0": {"num_groups": 2},
    "decorrelated_batch_norm": {"group_size": 2},
    "iterative_norm": {"group_size": 2},
    "power_norm": {"num_groups": 2},
}
"""Channels 0 and 1 are one group, 2 and 3 the other."""

SHAPE = (3, 2, 2, 4)  # examples, two positions along each axis, channels
SEEN = (2, 0, 0, 0)  # the last example: some know those before it alone


def axes_that_share(name):
    """Returns the letters of the axes along which another value of x changes y at SEEN."""
    cls = NORMS[name]
    fields = {"activation": nn.relu} if cls.replaces_activation else {}
    module = cls(**FIELDS.get(name, {}), **fields)
    x = jax.random.normal(jax.random.key(0), SHAPE) + 0.5
    variables = module.init(jax.random.key(1), x, train=True)

    @jax.jit
    def seen(x):
        y, _ = module.apply(variables, x, train=True, mutable=["batch_stats"])
        return y[SEEN]

    others = {"N": (0, 0, 0, 0), "H": (2, 1, 0, 0), "W": (2, 0, 1, 0)}
    channels = {"C": (2, 0, 0, 2), "C/G": (2, 0, 0, 1)}
    before = float(seen(x))

    def shares(place):
        return abs(float(seen(x.at[place].add(3.0))) - before) > 1e-5

    found = {letter for letter, place in others.items() if shares(place)}
    if shares(channels["C"]):
        return found | {"C"}
    return found | ({"C/G"} if shares(channels["C/G"]) else set())


@pytest.mark.parametrize("name", list(NORMS))
def test_the_axes_named_are_those_whose_values_matter(name):
    over = NORMS[name].facts.over.replace("examples before", "N")
    named = set(over.replace(";", " ").split()) - {"and", "past", "batches"}
    assert axes_that_share(name) == named


@pytest.mark.parametrize("name", list(NORMS))
def test_what_is_said_of_inference_is_said_of_the_stateful(name):
    facts = NORMS[name].facts
    assert (facts.at_inference != "the same") == NORMS[name].stateful


def test_a_limiting_case_names_another_normalizer():
    for name, cls in NORMS.items():
        for case in cls.facts.equals:
            named = {other for other in NORMS if other in case and other != name}
            assert named, case


def test_the_source_is_read_off_the_first_words():
    text = "A Norm. Ab, Çd & Ef 2019, arXiv:1911.09737 (unverified). Gh 2020, arXiv:2001.00001."
    assert source_of(text) == ("Ab, Çd & Ef 2019", "1911.09737")
    assert source_of("A Norm. Ab et al. 2019, arXiv:1911.09737.") == (
        "Ab et al. 2019",
        "1911.09737",
    )
    assert source_of("Nothing.") == ("", "")


def test_an_entry_is_read_off_the_module():
    by_name = {entry.name: entry for entry in entries(NORMS)}
    assert cells(by_name["batch_norm"]) == (
        "batch_norm",
        "N H W",
        "mean [C], var [C]",
        "bias [C], scale [C]",
        "running mean and variance",
        "3 + 5",
    )
    assert by_name["decorrelated_batch_norm"].state == ("mean [C]", "whitening [C/16, 16, 16]")
    assert by_name["dyt"].parameters == ("alpha []", "bias [C]", "scale [C]")
    assert all(entry.arxiv for name, entry in by_name.items() if name != "none")
