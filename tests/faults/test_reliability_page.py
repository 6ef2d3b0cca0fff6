"""docs/reliability.md: each fault has a test, and each test that is named exists."""

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "reliability.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


def functions_of(path):
    tree = ast.parse((REPOSITORY / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_each_test_that_is_named_exists():
    missing = [f"{path}::{name}" for path, name in NAMED if name not in functions_of(path)]
    assert missing == []


def test_each_row_of_a_table_of_faults_names_a_test():
    tables = re.findall(r"^\| fault \|.*\n\|---.*\n((?:\|.*\n)+)", PAGE, flags=re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) > 50
    assert [row for row in rows if not re.search(r"\| `tests/[^`]+` \|$", row)] == []


def test_each_test_of_this_folder_is_a_row_or_is_of_a_part_of_one():
    """A new fault gets a row; what is left out here says more of a row that is there."""
    here = Path(__file__).parent
    files = {f"tests/faults/{path.name}" for path in here.glob("test_*.py")}
    assert files - {path for path, _ in NAMED} == {"tests/faults/test_reliability_page.py"}
