"""Instruction data of several sources, and rows without padding."""

from __future__ import annotations

import pytest

from llmpruner import DataError
from llmpruner.calibration.mixture import Part, mixed, parse_mixture


def test_sources_and_shares(tmp_path, monkeypatch):
    assert parse_mixture("a.jsonl") == (Part("a.jsonl"),)
    assert parse_mixture("a.jsonl, name:config:train") == (Part("a.jsonl"), Part("name:config:train"))
    assert parse_mixture("3*a.jsonl,b.jsonl") == (Part("a.jsonl", 3.0), Part("b.jsonl", 1.0))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2*a,b.jsonl").write_text("{}")
    assert parse_mixture("2*a,b.jsonl") == (Part("2*a,b.jsonl"),)
    with pytest.raises(DataError, match="a share of 0 takes nothing of 'b'"):
        parse_mixture("a,0*b")
    with pytest.raises(DataError, match="a source with an empty name"):
        parse_mixture("a,,b")


def test_shares_take_as_many_as_there_can_be():
    one, other = list(range(100)), list(range(100, 120))
    assert mixed([(Part("a"), one), (Part("b"), other)], 0) == one + other
    found = mixed([(Part("a", 3.0), one), (Part("b", 1.0), other)], 0)
    assert (len([n for n in found if n < 100]), len([n for n in found if n >= 100])) == (60, 20)
    assert found == sorted(found) and found == mixed([(Part("a", 3.0), one), (Part("b", 1.0), other)], 0)
    assert found != mixed([(Part("a", 3.0), one), (Part("b", 1.0), other)], 1)
