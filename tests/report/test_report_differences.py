"""The table of paired differences: what is paired, what is refused, what is decided."""

import pytest

from normlab.report.differences import baseline_of, differences
from normlab.report.document import markdown
from normlab.report.page import html
from normlab.report.rows import load

TWO = {"settings": {"base": {}}, "norms": ("batch_norm", "layer_norm")}


@pytest.fixture
def row(make_sweep, tmp_path):
    """Returns the row of layer_norm against batch_norm, given accuracies and manifests by seed."""

    def make(ours, theirs, manifests=None):
        def run(setting, norm, seed):
            accuracy = (ours if norm == "layer_norm" else theirs)[seed]
            manifest = (manifests or {}).get((norm, seed), {})
            return accuracy and {"accuracy": accuracy, "manifest": manifest}

        make_sweep(tmp_path, **TWO, seeds=tuple(range(len(ours))), run=run)
        [found] = differences(load(tmp_path)).rows
        return found

    return make


def test_a_difference_far_above_its_spread_is_decided_and_bold(row, tmp_path):
    # Differences of 2.0, 2.1, 2.2 points: mean 2.10, s = 0.1, half-width 2.484 · 0.1 = 0.25.
    found = row((0.920, 0.941, 0.962), (0.90, 0.92, 0.94))
    assert [str(cell) for cell in found] == ["base", "layer_norm", "+2.10 ± 0.25", "3", "higher"]
    text = markdown(load(tmp_path))
    assert "| **+2.10 ± 0.25** | 3 | **higher** |" in text
    assert "Test accuracy minus that of batch\\_norm" in text or "that of batch_norm" in text
    assert '<span class="value strong">higher</span>' in html(load(tmp_path))


def test_a_difference_within_its_spread_says_how_many_seeds_more(row, tmp_path):
    # Differences of 0, 1 and 2 points: mean 1, s = 1, half-width 2.48. At d = 1 the paired t test
    # has 80% power with 10 seeds (Cohen 1988): 7 more.
    found = row((0.90, 0.91, 0.92), (0.90, 0.90, 0.90))
    assert [str(cell) for cell in found[2:]] == [
        "+1.00 ± 2.48",
        "3",
        "undecided; about 7 more seeds",
    ]
    assert not found[2].strong
    assert "**" not in markdown(load(tmp_path))


def test_only_seeds_that_both_have_are_compared(row):
    found = row((0.90, None, 0.92, 0.93), (0.90, 0.91, 0.90, None))
    assert [str(cell) for cell in found[2:4]] == ["+1.00 ± 12.71", "2"]


@pytest.mark.parametrize(
    ("field", "value", "other", "why"),
    [
        ("data_order_hash", "aa", "bb", "data order"),
        ("data_fingerprint", "aa", "bb", "data"),
        ("init_hashes", {"conv1/kernel": "3x3 aa"}, {"conv1/kernel": "3x3 bb"}, "conv1/kernel 3x3"),
    ],
)
def test_runs_that_are_not_paired_are_not_compared(row, field, value, other, why):
    manifests = {("layer_norm", 1): {field: value}, ("batch_norm", 1): {field: other}}
    found = row((0.90, 0.99, 0.92), (0.90, 0.90, 0.90), manifests)
    assert str(found[3]) == "2"
    assert why in found[2].marks[0]
    assert found[2].marks[0].startswith("seed 1 not paired: ")


@pytest.mark.parametrize("field", ["data_fingerprint", "data_order_hash"])
def test_runs_that_do_not_say_what_they_share_are_not_compared(row, field):
    found = row((0.90, 0.99, 0.92), (0.90, 0.90, 0.90), {("batch_norm", 1): {field: None}})
    assert str(found[3]) == "2"
    assert found[2].marks[0].startswith("seed 1 not paired: data")
    assert found[2].marks[0].endswith("not recorded")


def test_another_augmentation_is_not_paired(row):
    manifests = {("layer_norm", 1): {"augmentation_hash": "aa"}}
    found = row((0.90, 0.99, 0.92), (0.90, 0.90, 0.90), manifests)
    assert found[2].marks == ("seed 1 not paired: augmentation",)


def test_parameters_of_another_shape_or_path_are_not_common(row):
    manifests = {
        ("layer_norm", 0): {"init_hashes": {"norm1/scale": "8 aa", "head/kernel": "4x10 cc"}},
        ("batch_norm", 0): {"init_hashes": {"norm1/scale": "8x8x4 bb", "conv/kernel": "3x3 dd"}},
    }
    found = row((0.90, 0.91), (0.90, 0.90), manifests)
    assert str(found[3]) == "2"
    assert found[2].marks == ()


def test_every_further_comparison_widens_all(make_sweep, tmp_path):
    def run(setting, norm, seed):
        return {"accuracy": {"batch_norm": 0.90}.get(norm, 0.91) + 0.01 * seed * (norm != "none")}

    def half_width(norms, where):
        table = differences(load(make_sweep(tmp_path / where, **TWO | {"norms": norms}, run=run)))
        spread = next(row for row in table.rows if row[1].text == "none")[2].spread
        return float(spread.removeprefix("± "))

    alone = half_width(("batch_norm", "none"), "one")
    # t(1 - 0.05/4, 2) / t(0.975, 2) = 6.205347 / 4.302653; both are rounded to 0.01.
    both = half_width(("batch_norm", "none", "layer_norm"), "two")
    assert both / alone == pytest.approx(6.205347 / 4.302653, rel=0.01)


def test_two_shared_cells_are_compared_once(make_sweep, tmp_path):
    sweep = load(make_sweep(tmp_path, norms=("none", "layer_norm", "group_norm")))
    assert baseline_of(sweep) == "none"
    compared = [(row[0].text, row[1].text) for row in differences(sweep).rows]
    assert ("base", "layer_norm") in compared
    assert ("ghost 1", "layer_norm") not in compared


def test_one_normalizer_has_no_differences(make_sweep, tmp_path):
    sweep = load(make_sweep(tmp_path, **TWO | {"norms": ("batch_norm",)}))
    assert differences(sweep).rows == ()
    assert "Paired differences" not in markdown(sweep) + html(sweep)


@pytest.mark.parametrize(
    ("overrides", "paired"),
    [({}, False), ({"norm.epsilon": 0.1}, False), ({"model.kind": "nf_resnet20"}, True)],
)
def test_nets_of_different_kinds_need_not_start_alike(make_sweep, tmp_path, overrides, paired):
    def run(setting, norm, seed):
        other = norm == "layer_norm"
        digits = "3x3x1x16 bbbb" if other else "3x3x1x16 aaaa"
        return {
            "accuracy": 0.9 + 0.01 * seed + (0.02 + 0.001 * seed if other else 0.0),
            "manifest": {"init_hashes": {"conv_stem/kernel": digits}},
            "overrides": overrides if other else {},
        }

    make_sweep(tmp_path, **TWO, seeds=(0, 1, 2), run=run)
    [found] = differences(load(tmp_path)).rows
    assert str(found[3]) == ("3" if paired else "0")
