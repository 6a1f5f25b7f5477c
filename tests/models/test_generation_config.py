"""Published models have generation configurations that transformers loads, and refuses to save."""

from __future__ import annotations

import json

import pytest
import tiny_models
from transformers import AutoModelForCausalLM, GenerationConfig

import llmpruner
from llmpruner.models.save import valid_generation_config

TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
REFUSED = {
    "a padding token of -1": ({"pad_token_id": -1}, {}),
    "and no sampling": ({"pad_token_id": -1, "temperature": 0.6}, {"do_sample": True, "temperature": 0.6}),
    "sampling alone": ({"top_p": 0.9}, {"do_sample": True, "top_p": 0.9}),
    "scores that are not returned": ({"output_scores": True, "top_k": None}, {"do_sample": None}),
    "no samples and scores": ({"output_scores": True, "do_sample": False}, {}),
    "a cache that is not used": ({"use_cache": False, "cache_implementation": "static"}, {}),
    "many beams": ({"num_beams": 1, "length_penalty": 0.5, "pad_token_id": -1}, {}),
}


@pytest.mark.parametrize(("options", "kept"), REFUSED.values(), ids=REFUSED)
def test_it_is_valid_without_what_is_refused(options, kept):
    model = tiny_models.llama()
    model.generation_config = GenerationConfig.from_dict({**options, **TOKENS})
    found = valid_generation_config(model)
    found.validate(strict=True)
    assert {name: getattr(found, name) for name in (*TOKENS, *kept)} == {**TOKENS, **kept}


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_a_pruned_model_has_the_valid_one(place, tmp_path):
    tiny_models.llama().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    file = tmp_path / "model" / place
    values = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**values, "pad_token_id": -1, **TOKENS}))
    llmpruner.prune(tmp_path / "model", unit_ratio=0.25, importance="l1", output=tmp_path / "pruned")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").generation_config
    found.validate(strict=True)
    assert {name: getattr(found, name) for name in TOKENS} == TOKENS and found.pad_token_id is None


def test_the_last_resort_has_the_tokens(monkeypatch):
    """For a refusal that names no option."""
    model = tiny_models.llama()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2, 3], pad_token_id=-1, max_length=9)

    def refused(self, **_):
        if self.max_length == 9:
            raise TypeError("unorderable")

    monkeypatch.setattr(GenerationConfig, "validate", refused)
    found = valid_generation_config(model)
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, [2, 3], None)
    model.generation_config = None
    assert valid_generation_config(model) is None
