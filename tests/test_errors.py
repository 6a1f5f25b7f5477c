"""Messages of exceptions."""

from __future__ import annotations

import pytest
from pydantic import model_validator

from llmpruner import ComponentSettings
from llmpruner.errors import MissingExtraError, SettingsError, UnknownNameError
from llmpruner.settings import PruneSettings, settings_from
from llmpruner.values import validated


def test_an_unknown_name_offers_near_misses_and_lists_all():
    error = UnknownNameError("criterion", "tailor", ["l1", "taylor", "random"])
    assert str(error) == "unknown criterion 'tailor'; did you mean taylor? Known: l1, random, taylor."
    assert str(UnknownNameError("kind", "x", [])) == "unknown kind 'x'. Known: none."


def test_the_message_on_a_missing_extra_names_the_command():
    assert str(MissingExtraError("peft", "recover")) == "peft is not installed; run: pip install 'llmpruner[recover]'"


class Ordered(ComponentSettings):
    low: int = 0
    high: int = 1

    @model_validator(mode="after")
    def _in_order(self) -> Ordered:
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


def test_settings_of_a_plugin_that_do_not_go_together_are_one_line():
    with pytest.raises(SettingsError, match=r"^criterion mine: value \{'low': 2\}: low is above high$"):
        validated(Ordered, {"low": 2}, "criterion mine")


def test_a_setting_of_loading_is_said_to_be_one():
    with pytest.raises(SettingsError, match=r"setting 'dtype'; write load=LoadSettings\(dtype=…\), or --dtype$"):
        settings_from(PruneSettings, {"ratio": 0.2, "dtype": "bfloat16"})
