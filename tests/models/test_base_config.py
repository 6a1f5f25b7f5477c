"""The configuration of the dense model in a record."""

from __future__ import annotations

import json
from math import inf, isnan, nan

from transformers import PreTrainedConfig

from llmpruner.models.config import stated, values_of
from llmpruner.models.record import record_text


def test_numbers_that_json_does_not_have_come_back() -> None:
    config = PreTrainedConfig(limits=(0.0, inf), lowest=-inf, unknown=nan, rope={"short": {"factor": inf}}, count=3)
    record = json.loads(record_text({"base_config": stated(config)}))
    values = values_of(record)
    assert values["limits"] == [0.0, inf] and values["lowest"] == -inf and isnan(values["unknown"])
    assert values["rope"] == {"short": {"factor": inf}} and values["count"] == 3


def test_they_are_stated_as_in_the_file_of_the_configuration() -> None:
    config = PreTrainedConfig(limits=[0.0, inf], unknown=nan)
    in_file = json.loads(config.to_json_string(use_diff=False))
    assert {name: stated(config)[name] for name in ("limits", "unknown")} == {
        name: in_file[name] for name in ("limits", "unknown")
    }


def test_what_only_looks_like_such_a_number_stays() -> None:
    own = {"first": {"__float__": "1e400"}, "second": {"__float__": "Infinity", "more": 1}, "third": {"__float__": 3}}
    assert values_of({"base_config": own}) == own


def test_how_the_dense_weights_were_stored_is_left_out() -> None:
    config = PreTrainedConfig(quantization_config={"quant_method": "fp8"})
    assert "quantization_config" not in stated(config)
