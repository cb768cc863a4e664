"""SECURITY.md: each of its promises names a test that exists."""

import re

import pytest

from training.runs import ROOT

TABLES = re.split(r"^## ", (ROOT / "SECURITY.md").read_text(), flags=re.M)[1:4]
FOLDERS = ("", "inference/serve/", "tools/ui/")
NAMED = [
    (folder + file, name)
    for folder, table in zip(FOLDERS, TABLES)
    for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", table)
]


@pytest.mark.parametrize("file, name", NAMED, ids=[name for _, name in NAMED])
def test_a_promise_has_its_test(file, name):
    assert f"def {name}(" in (ROOT / "tests" / file).read_text()


def test_no_promise_is_without_one():
    rows = [line for table in TABLES for line in table.splitlines() if line.startswith("| ")]
    assert len(NAMED) == len(rows) - len(TABLES)  # each table has a line of names
