"""Vicuna is recognised by its name, its generation settings or --family, and never by guess."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llmpruner_vicuna import V0, V1_1, chat_template
from transformers import AutoConfig, LlamaConfig

from llmpruner import Catalog
from llmpruner.plugins.manager import plugin_manager

LLAMA_2 = {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6, "max_length": 4096}


def family_of(name_or_path: str, **values: object) -> str:
    config = LlamaConfig(num_hidden_layers=1, **values)
    config.name_or_path = name_or_path
    return Catalog(plugin_manager()).family_for(config).name


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("lmsys/vicuna-7b-v1.5", "vicuna"),
        ("lmsys/Vicuna-13B-v1.3", "vicuna"),
        ("hub/models--lmsys--vicuna-7b-v1.5/snapshots/3321f76e", "vicuna"),
        ("lmsys/vicuna-7b-v0", "vicuna-v0"),
        ("lmsys/vicuna-7b-v0.1-like", "vicuna-v0"),
        ("lmsys/vicuna-33b-v1.3", "vicuna"),
        ("TheBloke/stable-vicuna-13B-HF", "vicuna-v0"),
        ("models/StableVicuna_13b", "vicuna-v0"),
        ("TheBloke/Wizard-Vicuna-13B-HF", "vicuna"),
        ("NousResearch/gpt4-x-vicuna-13b", "llama"),
        ("meta-llama/Llama-2-7b-hf", "llama"),
        ("/home/vicuna/models/llama-7b", "llama"),
        ("", "llama"),
    ],
)
def test_by_name(name: str, family: str) -> None:
    assert family_of(name) == family


@pytest.mark.parametrize(("folder", "saved_as"), [("gpt4-x-vicuna-13b", "vicuna-13b-1.1"), ("m", "gpt4-x-vicuna-13b")])
def test_a_vicuna_that_was_tuned_on_another_format_has_that_of_llama(
    folder: str, saved_as: str, tmp_path: Path
) -> None:
    """Alpaca's: its card gives prompts with ``### Instruction:`` and ``### Response:``."""
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path / folder)
    file = tmp_path / folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_name_or_path": saved_as}))
    family = Catalog(plugin_manager()).family_for(AutoConfig.from_pretrained(tmp_path / folder))
    assert family.name == "llama" and "### Instruction:" in family.format_prompt("Why?")


def test_sizes_ids_and_common_settings_identify_no_vicuna(tmp_path: Path) -> None:
    LlamaConfig(vocab_size=32001, pad_token_id=0).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(LLAMA_2))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "USER: {{ messages }} ASSISTANT:"}')
    assert family_of(str(tmp_path), vocab_size=32001) == "llama"


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_by_the_name_it_was_saved_under(file: str, tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / file).write_text(json.dumps(values | {"_name_or_path": "lmsys/vicuna-7b-v1.5"}))
    assert Catalog(plugin_manager()).family_for(AutoConfig.from_pretrained(tmp_path)).name == "vicuna"


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize(("template", "family"), [(V1_1, "vicuna"), (V0, "vicuna-v0")])
def test_by_its_chat_template(template: object, family: str, place: str, tmp_path: Path) -> None:
    text = chat_template(template)
    content = text if place.endswith("jinja") else json.dumps({"chat_template": text})
    (tmp_path / place).write_text(content, encoding="utf-8")
    assert family_of(str(tmp_path)) == family


def test_by_family() -> None:
    catalog = Catalog(plugin_manager())
    assert catalog.family_for(LlamaConfig(), "vicuna").name == "vicuna"
    assert catalog.family_for(LlamaConfig(), "vicuna-v0").name == "vicuna-v0"
