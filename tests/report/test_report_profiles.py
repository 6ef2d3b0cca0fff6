"""What a probe found, as table, data and figure."""

import csv
import io
import json
import math

import pytest

from normlab.report import canvas, profiles
from normlab.report.profiles import Profile


def profile(**fields):
    found = {
        "probe": "signals",
        "title": "Signals by depth: some_net",
        "subject": {"model": "some_net"},
        "places": ("first", "second"),
        "seeds": (3, 4),
        "values": {"variance": [[1.0, 2.0], [3.0, 4.0]], "growth": [[0.5, None], [1.5, None]]},
        "predicted": {"growth": [1.25, None]},
        "drawn": ("variance", "growth"),
        "ylabel": "variance",
    }
    return Profile(**found | fields)


def test_a_table_has_means_over_seeds_and_predictions_beside_them():
    table = profiles.table(profile())
    assert table.columns == ("place", "variance", "growth", "predicted growth")
    rows = [[str(cell) for cell in row] for row in table.rows]
    assert rows == [["first", "2", "1", "1.25"], ["second", "3", "–", "–"]]


def refuse(word):
    raise ValueError(f"{word} is no JSON")


def test_what_is_not_finite_is_not_what_was_not_measured():
    values = {"variance": [[1.0, math.nan, 3.0], [math.inf, 4.0, None]]}
    places = ("first", "second", "third")
    found = profile(places=places, values=values, predicted={}, drawn=("variance",))
    assert str(found.mean("variance")) == "[inf, nan, 3.0]"
    rows = [[str(cell) for cell in row] for row in profiles.table(found).rows]
    assert rows == [["first", "inf"], ["second", "nan"], ["third", "3"]]
    data = json.loads(profiles.json_text(found), parse_constant=refuse)
    assert data["values"]["variance"] == [[1, "nan", 3], ["inf", 4, None]]
    lines = list(csv.reader(io.StringIO(profiles.csv_text(found))))
    assert [line[2] for line in lines[1:]] == ["1.0", "nan", "3.0", "inf", "4.0", ""]
    assert list(canvas.files([profiles.panel(found)]))


def test_the_first_place_of_any_seed_that_is_not_finite():
    places = ("first", "second", "third")
    rows = [[1.0, None, math.inf], [1.0, math.nan, 2.0]]
    assert profiles.first_not_finite(places, rows) == "second"
    assert profiles.first_not_finite(places, rows[:1]) == "third"
    assert profiles.first_not_finite(places, [[1.0, None, 0.0]]) is None


def test_data_keep_each_seed_in_full_precision():
    found = profile(values={"variance": [[1 / 3, 2.0], [3.0, 4.0]]}, predicted={})
    lines = list(csv.reader(io.StringIO(profiles.csv_text(found))))
    assert lines[0] == ["seed", "place", "variance"]
    assert lines[1] == ["3", "first", repr(1 / 3)]
    assert [line[:2] for line in lines[1:]] == [
        ["3", "first"],
        ["3", "second"],
        ["4", "first"],
        ["4", "second"],
    ]
    assert json.loads(profiles.json_text(found))["values"]["variance"][0][0] == 1 / 3


def test_files_are_the_same_bytes_each_time(tmp_path):
    paths = [profiles.write(profile(), tmp_path / name) for name in "ab" if mkdir(tmp_path / name)]
    assert [path.name for path in paths[0]] == [
        f"signals.{s}" for s in ("json", "csv", "svg", "pdf")
    ]
    assert [p.read_bytes() for p in paths[0]] == [p.read_bytes() for p in paths[1]]
    svg = (tmp_path / "a" / "signals.svg").read_text()
    assert "predicted growth" in svg
    assert "Date" not in svg


def mkdir(path):
    path.mkdir()
    return True


def test_a_log_scale_names_powers_of_ten_in_plain_text(tmp_path):
    values = {"variance": [[1e-3, 1e5]]}
    found = profile(seeds=(0,), values=values, predicted={}, drawn=("variance",))
    svg = profiles.write(found, tmp_path)[2].read_text()
    assert "10⁻" in svg
    assert "mathdefault" not in svg


@pytest.mark.parametrize(("largest", "scale"), [(30.0, "linear"), (300.0, "log")])
def test_what_spans_decades_is_drawn_on_a_log_scale(largest, scale):
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    values = {"variance": [[1.0, largest]]}
    profiles.panel(profile(seeds=(0,), values=values, predicted={}, drawn=("variance",))).draw(axes)
    assert axes.get_yscale() == scale
