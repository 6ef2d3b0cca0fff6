"""`normlab list norms` and the page that it writes."""

from pathlib import Path

import pytest

from normlab.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "normalizers.md"


def test_the_page_of_all_normalizers_is_made_from_the_modules(capsys):
    assert main(["list", "norms", "--markdown"]) == 0
    assert capsys.readouterr().out == PAGE.read_text(encoding="utf-8")


def test_the_table_has_a_row_a_normalizer_and_its_limiting_cases(capsys):
    assert main(["list", "norms"]) == 0
    table, _, cases = capsys.readouterr().out.partition("\nLimiting cases:\n")
    rows = {line.split()[0]: line for line in table.splitlines()}
    assert "N H W" in rows["batch_norm"]
    assert "Ioffe & Szegedy 2015" in rows["batch_norm"]
    assert "  group_norm = layer_norm: num_groups 1" in cases.splitlines()


def test_only_normalizers_have_a_page(capsys):
    assert main(["list", "models", "--markdown"]) == 2
    assert capsys.readouterr().err == "normlab: --markdown is for norms, not models\n"


@pytest.mark.parametrize("kind", ["models", "convs", "optimizers", "data"])
def test_the_others_are_a_line_each(kind, capsys):
    assert main(["list", kind]) == 0
    assert all(len(line.split()) > 1 for line in capsys.readouterr().out.splitlines())
