"""Grids of config fields: how they multiply and add, and what their settings are called."""

import pytest

from normlab.errors import UserError
from normlab.grid import grid, settings, tune


def test_a_grid_is_every_combination_with_the_first_axis_slowest():
    points = list(grid({"norm": ["a", "b"], "batch_stats.ghost_size": [32, 2]}, {"x.y": 1}))
    assert [(p.fields["norm"], p.fields["batch_stats.ghost_size"]) for p in points] == [
        ("a", 32),
        ("a", 2),
        ("b", 32),
        ("b", 2),
    ]
    assert all(p.fields["x.y"] == 1 for p in points)


def test_a_setting_is_named_by_what_is_swept_the_norm_and_the_fixed_apart():
    [point] = grid({"norm": ["a"], "batch_stats.ghost_size": [2]}, {"x.y": 1})
    assert point.setting == "ghost_size=2"
    assert point.swept == {"batch_stats.ghost_size": 2}
    assert next(iter(grid({"norm": ["a"]}))).setting == "base"


def test_a_name_without_a_dot_is_a_choice_and_the_rest_overrides():
    [point] = grid({"norm": ["a"], "model": ["mlp"], "optim.base_lr": [0.1]})
    assert point.choices == {"norm": "a", "model": "mlp"}
    assert point.overrides == {"optim.base_lr": 0.1}


def test_grids_multiply_and_add():
    norms = grid({"norm": ["a", "b"]})
    rates = grid({"optim.base_lr": [0.1, 0.5]})
    assert len(norms * rates) == 4
    # A setting for one normalizer alone: r_max is batch_renorm's.
    some = norms + grid({"norm": ["batch_renorm"], "norm.r_max": [1.0, 3.0]})
    assert [p.setting for p in some] == ["base", "base", "r_max=1.0", "r_max=3.0"]


def test_named_settings_carry_their_fields():
    points = list(settings({"lr x5": {"optim.base_lr": 0.5}}) * grid({"norm": ["a"]}))
    assert [(p.setting, p.overrides) for p in points] == [("lr x5", {"optim.base_lr": 0.5})]


def test_what_is_tuned_makes_no_setting():
    points = list(grid({"norm": ["a"]}) * tune({"optim.base_lr": [0.1, 0.5]}))
    assert {p.setting for p in points} == {"base"}
    assert [p.tuned for p in points] == [{"optim.base_lr": 0.1}, {"optim.base_lr": 0.5}]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grid({"norm": []}), "gives 'norm' no value"),
        (lambda: grid({"a.b": [1, 1]}), "gives 'a.b' the same value twice"),
        (lambda: grid({"a.b": [1]}) * grid({"a.b": [2]}), "sets 'a.b' twice"),
        (lambda: grid({"a.b": [1]}, {"a.b": 2}), "sets 'a.b' twice"),
    ],
)
def test_a_grid_that_contradicts_itself_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
