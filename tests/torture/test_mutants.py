"""The mutants of the cluster fit the source; `python -m tests.torture.mutants` runs the tests on them."""

import pytest

from torture.mutants import MUTANTS, ROOT


@pytest.mark.parametrize("name", MUTANTS)
def test_each_change_of_a_mutant_replaces_one_place(name):
    for change in MUTANTS[name].changes:
        assert (ROOT / change.path).read_text().count(change.old) == 1, change.old
    for test in MUTANTS[name].tests:
        path, _, function = test.partition("::")
        assert f"def {function}" in (ROOT / path).read_text()
