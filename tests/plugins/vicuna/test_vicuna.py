"""Vicuna: prompts and labels against those of FastChat (tests/data/vicuna), which models are recognised, and official
delta weights: bit for bit what FastChat's apply_delta gives, or one line that says why not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from llmpruner_vicuna import V0, V1_1, VicunaFamily, VicunaV0Family, chat_template
from llmpruner_vicuna.delta import apply_delta
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from llmpruner import CheckpointError, LlmprunerError, ModelError, OutputError, load_catalog
from llmpruner.calibration.chat import chat_prompt, labelled, training_texts
from llmpruner.calibration.conversations import Conversation, Instruction, read_examples
from llmpruner.cli import main
from llmpruner.discovery.opening import family_for

DATA = Path(__file__).parents[2] / "data" / "vicuna"
PROMPTS = json.loads((DATA / "prompts.json").read_text(encoding="utf-8"))
MASKS = json.loads((DATA / "masks.json").read_text(encoding="utf-8"))
OFFICIAL = {"head/vicuna_v1.1": V1_1, "head/zero_shot": V0}


def exchanges_of(conversation: str) -> list[tuple[str, str]]:
    turns = [turn["value"] for turn in PROMPTS[conversation]["conversations"]]
    turns = turns[1:] if len(turns) % 2 else turns  # the assistant began
    return list(zip(turns[::2], turns[1::2], strict=True))


@cache
def tokenizer(legacy: bool) -> Any:
    return AutoTokenizer.from_pretrained(DATA / "tokenizer", legacy=legacy)


@pytest.mark.parametrize("conversation", PROMPTS)
@pytest.mark.parametrize("template", OFFICIAL)
def test_prompts_and_chat_templates_to_the_character(conversation: str, template: str) -> None:
    exchanges, ours = exchanges_of(conversation), OFFICIAL[template]
    expected = PROMPTS[conversation]["prompts"][template]
    assert "".join(prompt + answer for prompt, answer in ours.format_conversation(exchanges)) == expected["full"]
    if len(exchanges) == 1:
        assert ours.format_conversation(exchanges)[0][0] == expected["generation"]

    def render(messages: list[dict[str, Any]], **options: Any) -> object:
        options = {"chat_template": chat_template(ours), "tokenize": False, **options}
        return tokenizer(False).apply_chat_template(messages, **options)

    roles = ("user", "assistant")
    messages = [{"role": role, "content": text} for pair in exchanges for role, text in zip(roles, pair, strict=True)]
    assert render(messages) == "<s>" + expected["full"]
    assert render(messages[:-1], add_generation_prompt=True) == "<s>" + expected["generation"]
    own = render([{"role": "system", "content": "Be brief."}, *messages])
    assert own == "<s>" + expected["full"].replace(ours.system, "Be brief.")


@pytest.mark.parametrize(
    ("family", "template"), [(VicunaFamily(), "head/vicuna_v1.1"), (VicunaV0Family(), "head/zero_shot")]
)
def test_conversations_are_asked_and_trained_on_with_fastchats_ends(family: VicunaFamily, template: str) -> None:
    ((first, said), (second, last)) = exchanges_of("two_turns")
    expected, chosen = PROMPTS["two_turns"]["prompts"][template], tokenizer(False)
    assert chat_prompt(family, chosen, second, [(first, f" {said}\n")]) == (expected["generation"], False)
    (text,) = training_texts(Conversation(((first, said), (second, last))), family, chosen)
    assert "".join(a + b for a, b in text.turns) == expected["full"]
    row = labelled(text, chosen, 512)
    assert row["input_ids"] == chosen(expected["full"])["input_ids"]
    (single,) = training_texts(Instruction(first, said), family, chosen)
    (turn,) = single.turns
    assert turn == (chat_prompt(family, chosen, first).text, f" {said}{family.chat_format.closing[1]}")


def test_answers_of_v0_stop_where_fastchat_stops_them() -> None:
    assert V1_1.stop_text is None
    assert V0.stop_text == PROMPTS["one_turn"]["prompts"]["head/zero_shot"]["stop_str"] == "###"


def test_a_system_message_takes_the_place_of_the_official_one() -> None:
    ((prompt, answer),) = V1_1.format_conversation([("What is pruning?", "Less.")], "Be brief.")
    assert (prompt, answer) == ("Be brief. USER: What is pruning? ASSISTANT:", " Less.</s>")


@pytest.mark.parametrize("version", [v for v in MASKS["one_turn"] if v.startswith("HEAD")])
@pytest.mark.parametrize("conversation", PROMPTS)
def test_recovery_trains_on_the_official_ids_and_labels(conversation: str, version: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([PROMPTS[conversation]]))
    chosen = tokenizer("legacy=True" in version)
    expected = MASKS[conversation][version]
    ((_, one),) = read_examples(str(tmp_path / "data.json"))
    (text,) = training_texts(one, VicunaFamily(), chosen)
    cutoff = len(expected["input_ids"]) if version.endswith("full-6") else 256
    row = labelled(text, chosen, cutoff)
    assert row == {"input_ids": expected["input_ids"], "labels": expected["labels"]}


# Which models are Vicunas

LLAMA_2 = {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6, "max_length": 4096}


def family_of(name_or_path: str, **values: object) -> str:
    config = LlamaConfig(num_hidden_layers=1, **values)
    config.name_or_path = name_or_path
    return family_for(load_catalog(), config).name


@pytest.mark.parametrize(("name", "family"), [
    ("lmsys/vicuna-7b-v1.5", "vicuna"),
    ("hub/models--lmsys--vicuna-7b-v1.5/snapshots/3321f76e", "vicuna"),
    ("lmsys/vicuna-7b-v0", "vicuna-v0"),
    ("lmsys/vicuna-7b-v0.1-like", "vicuna-v0"),
    ("TheBloke/stable-vicuna-13B-HF", "vicuna-v0"),
    ("models/StableVicuna_13b", "vicuna-v0"),
    ("TheBloke/Wizard-Vicuna-13B-HF", "vicuna"),
    ("NousResearch/gpt4-x-vicuna-13b", "llama"),
    ("/home/vicuna/models/llama-7b", "llama"),
    ("", "llama"),
])  # fmt: skip
def test_by_name(name: str, family: str) -> None:
    assert family_of(name) == family


@pytest.mark.parametrize(("folder", "saved_as"), [("gpt4-x-vicuna-13b", "vicuna-13b-1.1"), ("m", "gpt4-x-vicuna-13b")])
def test_a_vicuna_of_another_format_has_that_of_llama(folder: str, saved_as: str, tmp_path: Path) -> None:
    """Alpaca's: its card gives prompts with ``### Instruction:`` and ``### Response:``."""
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path / folder)
    set_config(tmp_path / folder, _name_or_path=saved_as)
    family = family_for(load_catalog(), AutoConfig.from_pretrained(tmp_path / folder))
    assert family.name == "llama" and "### Instruction:" in chat_prompt(family, None, "Why?").text


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
    assert family_for(load_catalog(), AutoConfig.from_pretrained(tmp_path)).name == "vicuna"


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize(("template", "family"), [(V1_1, "vicuna"), (V0, "vicuna-v0")])
def test_by_its_chat_template(template: object, family: str, place: str, tmp_path: Path) -> None:
    text = chat_template(template)
    content = text if place.endswith("jinja") else json.dumps({"chat_template": text})
    (tmp_path / place).write_text(content, encoding="utf-8")
    assert family_of(str(tmp_path)) == family


# Deltas


VERSIONS = {"delta_v0": "vicuna-v0", "delta_v1": "vicuna"}


def same_bits(folder: Path, version: str) -> bool:
    one, other = (load_file(f) for f in (folder / "model.safetensors", DATA / version / "expected.safetensors"))
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k].view(torch.int16), other[k].view(torch.int16))
        for k in one
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_the_sum_is_bit_identical_with_configuration_and_tokenizer_of_the_delta(version: str, tmp_path: Path) -> None:
    apply_delta(DATA / version / "base", DATA / version / "delta", tmp_path / "sum")
    assert same_bits(tmp_path / "sum", version)
    assert [p.name for p in tmp_path.iterdir()] == ["sum"]
    expected = load_file(DATA / version / "logits.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sum", dtype=torch.float32)
    with torch.no_grad():
        logits = model(expected["input_ids"].long()).logits
    assert (logits - expected["logits_fp32"]).abs().max() <= 2e-5
    ours, theirs = (AutoTokenizer.from_pretrained(p) for p in (tmp_path / "sum", DATA / version / "delta"))
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.pad_token == "[PAD]") == (version == "delta_v0")
    assert ours("hi there</s>")["input_ids"] == theirs("hi there</s>")["input_ids"]
    config = AutoConfig.from_pretrained(tmp_path / "sum")
    assert config.vocab_size == len(ours)
    assert config.dtype == torch.float16
    generation = json.loads((tmp_path / "sum" / "generation_config.json").read_text())
    assert generation == json.loads((DATA / version / "delta" / "generation_config.json").read_text())
    catalog = load_catalog()
    assert family_for(catalog, config).name == VERSIONS[version]
    assert family_for(catalog, AutoConfig.from_pretrained(DATA / version / "base")).name == "llama"


def edit(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path, Path], None]:
    def damage(_: Path, delta: Path) -> None:
        state = torch.load(delta / "pytorch_model.bin", weights_only=True)
        change(state)
        torch.save(state, delta / "pytorch_model.bin")

    return damage


def set_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


DAMAGE: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "a shard of the base is missing": (
        lambda b, d: (b / "pytorch_model-00002-of-00002.bin").unlink(), r"/base' .*pytorch_model-00002-of-00002\.bin"
    ),
    "the delta is truncated": (
        lambda b, d: os.truncate(d / "pytorch_model.bin", 9000), r"cannot load model '.*/delta' \("
    ),
    "the base is no LLaMA": (lambda b, d: set_config(b, model_type="gpt2"), r"'.*/base' lacks tensor 'transformer\."),
    "another depth": (
        edit(lambda s: s.pop("model.layers.1.mlp.up_proj.weight")),
        r"'.*/delta' lacks tensor 'model\.layers\.1\.mlp\.up_proj\.weight'",
    ),
    "another width": (
        edit(lambda s: s.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(40, 32, dtype=torch.float16)})),
        r"'.*/delta' has in another shape .* 'model\.layers\.0\.mlp\.up_proj\.weight'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_one_line_and_nothing_is_written(what: str, tmp_path: Path) -> None:
    base, delta = (shutil.copytree(DATA / "delta_v0" / p, tmp_path / "in" / p) for p in ("base", "delta"))
    damage, message = DAMAGE[what]
    damage(base, delta)
    with pytest.raises(LlmprunerError, match=message) as caught:
        apply_delta(base, delta, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_the_deltas_of_the_two_releases_are_not_interchangeable(tmp_path: Path) -> None:
    for base, delta in (("delta_v0", "delta_v1"), ("delta_v1", "delta_v0")):
        with pytest.raises(CheckpointError, match="is no delta for"):
            apply_delta(DATA / base / "base", DATA / delta / "delta", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_delta_on_the_hub_is_to_be_downloaded(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hf download REPO"):
        apply_delta(DATA / "delta_v0" / "base", Path("lmsys/vicuna-7b-delta-v1.1"), tmp_path / "out")


def test_an_output_that_exists_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmpruner_vicuna.delta.load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(OutputError, match="exists already"):
        apply_delta(DATA / "delta_v0" / "base", DATA / "delta_v0" / "delta", tmp_path)


def test_at_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = DATA / "delta_v0"
    command = ["apply-delta", folder / "base", folder / "delta", "-o", tmp_path / "sum"]
    monkeypatch.setattr("sys.argv", ["llmpruner", *map(str, command)])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code and same_bits(tmp_path / "sum", "delta_v0")
