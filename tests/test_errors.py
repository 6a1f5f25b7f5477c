"""Messages of exceptions."""

from __future__ import annotations

from llmpruner.errors import MissingExtraError, UnknownNameError


def test_an_unknown_name_offers_near_misses_and_lists_all():
    error = UnknownNameError("criterion", "tailor", ["l1", "taylor", "random"])
    assert str(error) == "unknown criterion 'tailor'; did you mean taylor? Known: l1, random, taylor."
    assert str(UnknownNameError("kind", "x", [])) == "unknown kind 'x'. Known: none."


def test_the_message_on_a_missing_extra_names_the_command():
    assert str(MissingExtraError("peft", "recover")) == "peft is not installed; run: pip install 'llmpruner[recover]'"
