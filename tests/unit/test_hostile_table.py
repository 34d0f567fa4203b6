"""The table of faults in docs/troubleshooting.md names tests that exist."""

import re

from tests.conftest import REPOSITORY

ROW = re.compile(r"^\|.*\| `(tests/[a-z0-9_/]+\.py)::(test_[a-z0-9_]+)` \|$", re.MULTILINE)


def test_every_test_that_the_table_of_faults_names_is_there():
    named = ROW.findall((REPOSITORY / "docs" / "troubleshooting.md").read_text())
    assert len(named) >= 36
    for file, name in named:
        assert f"def {name}(" in (REPOSITORY / file).read_text(), f"{file}::{name}"
