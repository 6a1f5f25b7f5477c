"""The changes of code that `benchmarks.code_mutations` makes, on a small file."""

from __future__ import annotations

import sys

import pytest

from benchmarks import code_mutations
from benchmarks.code_mutations import Change, Finder, changed, changes_of

SOURCE = '''"""A docstring of 3 words."""
LIMIT: int = 4


def within(number: int, least: int = 0) -> bool:
    """Whether ``number`` is in 1 range."""
    if number < least:
        raise ValueError(f"{number + 1} is less")
    return number <= LIMIT and not number == 3
'''


@pytest.fixture
def small(tmp_path, monkeypatch) -> str:
    (tmp_path / "small_code.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.setattr(code_mutations, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "small_code.py"
    sys.modules.pop("small_code", None)


def run(change: Change) -> dict:
    names: dict = {}
    exec(changed(change), names)
    return names


def test_all_changes_are_of_what_is_computed(small):
    found = [(change.line, change.what) for change in changes_of(small)]
    assert found == [
        (2, "4 → 5"),
        (5, "0 → 1"),
        (7, "number < least → LtE"),
        (8, "without: raise ValueError(f'{number + 1} is less')"),
        (7, "if not (number < least)"),
        (9, "number <= LIMIT → Lt"),
        (9, "3 → 4"),
        (9, "number == 3 → NotEq"),
        (9, "not number == 3 → number == 3"),
        (9, "number <= LIMIT and (not number == 3) → Or"),
        (9, "return number <= LIMIT and (not number == 3) → None"),
    ]


def test_one_change_is_made_at_a_time(small):
    results = []
    for change in changes_of(small):
        within = run(change)["within"]
        try:
            results.append([within(number) for number in (0, 3, 4, 5)])
        except ValueError:
            results.append("refused")
    unchanged = [True, False, True, False]
    assert results[0] == [True, False, True, True]
    assert results[1] == results[2] == results[4] == "refused"
    assert results[3] == unchanged, "no test of this file is below the least"
    assert results[5] == [True, False, False, False]
    assert results[6] == [True, True, False, False]
    assert results[7] == results[8] == [False, True, False, False]
    assert results[9] == [True, True, True, True]
    assert results[10] == [None] * 4


def test_an_import_gives_the_changed_module(small, monkeypatch):
    change = next(change for change in changes_of(small) if change.what == "4 → 5")
    monkeypatch.setattr(sys, "meta_path", [Finder(change), *sys.meta_path])
    import small_code

    assert small_code.LIMIT == 5


PROCESS = """assert not os.system(f'{sys.executable} -c "import small_code; assert small_code.LIMIT == NUMBER"')"""
TESTS = {
    "assert small_code.LIMIT == 4": "killed",
    PROCESS.replace("NUMBER", "4"): "killed",
    PROCESS.replace("NUMBER", "5"): "survived",
    "pass": "survived",
}


@pytest.mark.parametrize("test", TESTS)
def test_what_a_test_says_of_a_change(small, tmp_path, monkeypatch, test):
    expected = TESTS[test]
    monkeypatch.chdir(tmp_path)
    text = f"import os, sys\nimport small_code\ndef test_limit(): {test}\n"
    (tmp_path / "test_it.py").write_text(text, encoding="utf-8")
    change = next(change for change in changes_of(small) if change.what == "4 → 5")
    assert code_mutations.outcome(change, ["test_it.py::test_limit"]) == expected
    assert code_mutations.outcome(change, []) == "no test"
