"""Vicuna's prompts and labels against those of FastChat (tests/data/vicuna)."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from llmpruner_vicuna import V0, V1_1, Template, VicunaFamily, VicunaV0Family, chat_template

from llmpruner.calibration.chat import chat_prompt, labelled, training_texts
from llmpruner.calibration.conversations import Conversation, Instruction, Message, read_examples

DATA = Path(__file__).parents[2] / "data" / "vicuna"
PROMPTS = json.loads((DATA / "prompts.json").read_text(encoding="utf-8"))
MASKS = json.loads((DATA / "masks.json").read_text(encoding="utf-8"))
OFFICIAL = {"head/vicuna_v1.1": V1_1, "head/zero_shot": V0}


def exchanges_of(conversation: str) -> list[tuple[str, str]]:
    turns = [turn["value"] for turn in PROMPTS[conversation]["conversations"]]
    turns = turns[1:] if len(turns) % 2 else turns  # the assistant began
    return list(zip(turns[::2], turns[1::2], strict=True))


def text_of(template: Template, exchanges: list[tuple[str, str]]) -> str:
    return "".join(prompt + answer for prompt, answer in template.exchanges(exchanges))


@pytest.mark.parametrize("conversation", PROMPTS)
@pytest.mark.parametrize("template", OFFICIAL)
def test_prompts_to_the_character(conversation: str, template: str) -> None:
    exchanges, ours = exchanges_of(conversation), OFFICIAL[template]
    expected = PROMPTS[conversation]["prompts"][template]
    assert text_of(ours, exchanges) == expected["full"]
    if len(exchanges) == 1:
        assert ours.exchanges(exchanges)[0][0] == expected["generation"]


@pytest.mark.parametrize("conversation", PROMPTS)
def test_the_answers_are_the_text_with_loss(conversation: str) -> None:
    answers = [answer for _, answer in V1_1.exchanges(exchanges_of(conversation))]
    for version in ("v1.1 HEAD", "v1.1 @00d9e667"):
        assert answers == PROMPTS[conversation]["train"][version]["span_texts"]


@cache
def tokenizer(legacy: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DATA / "tokenizer", legacy=legacy)


def test_the_families_prompt_and_train_with_their_template() -> None:
    question, answer = "What is pruning?", "Pruning removes weights from a network."
    for family, template in ((VicunaFamily(), "head/vicuna_v1.1"), (VicunaV0Family(), "head/zero_shot")):
        expected = PROMPTS["one_turn"]["prompts"][template]
        assert chat_prompt(family, None, question) == (expected["generation"], False)
        assert [prompt for prompt, _ in family.format_conversation([(question, answer)])] == [expected["generation"]]
    expected = PROMPTS["two_turns"]
    exchanges = VicunaFamily().format_conversation(
        [("Name two rivers.", "The Elbe and the Loire."), ("Which one is longer?", "The Loire, at about 1006 km.")]
    )
    assert "".join(a + b for a, b in exchanges) == expected["prompts"]["head/vicuna_v1.1"]["full"]
    assert [b for _, b in exchanges] == expected["train"]["v1.1 HEAD"]["span_texts"]


@pytest.mark.parametrize(
    ("family", "template"), [(VicunaFamily(), "head/vicuna_v1.1"), (VicunaV0Family(), "head/zero_shot")]
)
def test_conversations_are_asked_and_trained_on_with_fastchats_ends(family: VicunaFamily, template: str) -> None:
    ((first, said), (second, last)) = exchanges_of("two_turns")
    expected, chosen = PROMPTS["two_turns"]["prompts"][template], tokenizer(False)
    assert chat_prompt(family, chosen, second, [(first, f" {said}\n")]) == (expected["generation"], False)
    chat = Conversation(
        (Message("user", first), Message("assistant", said), Message("user", second), Message("assistant", last))
    )
    (text,) = training_texts(chat, family, chosen)
    assert "".join(a + b for a, b in text.turns) == expected["full"]
    row = labelled(text, chosen, 512)
    assert row["input_ids"] == chosen(expected["full"])["input_ids"]
    (single,) = training_texts(Instruction(first, said), family, chosen)
    (turn,) = single.turns
    assert turn == (chat_prompt(family, chosen, first).text, f" {said}{family.template.closing[1]}")


def test_answers_of_v0_stop_where_fastchat_stops_them() -> None:
    assert VicunaFamily().stop_text is None
    assert VicunaV0Family().stop_text == PROMPTS["one_turn"]["prompts"]["head/zero_shot"]["stop_str"] == "###"


def test_the_families_format_wins_over_a_chat_template(tmp_path: Path) -> None:
    templated = copy.deepcopy(tokenizer(False))
    templated.chat_template = "{{ messages[0]['content'] }}"
    expected = PROMPTS["one_turn"]["prompts"]["head/vicuna_v1.1"]
    assert chat_prompt(VicunaFamily(), templated, "What is pruning?") == (expected["generation"], False)
    (tmp_path / "data.json").write_text(json.dumps([PROMPTS["one_turn"]]))
    ((_, one),) = read_examples(str(tmp_path / "data.json"))
    (text,) = training_texts(one, VicunaFamily(), templated)
    assert "".join(a + b for a, b in text.turns) == expected["full"]
    assert not text.has_special_tokens


def test_a_system_message_takes_the_place_of_the_official_one() -> None:
    ((prompt, answer),) = VicunaFamily().format_conversation([("What is pruning?", "Less.")], "Be brief.")
    assert (prompt, answer) == ("Be brief. USER: What is pruning? ASSISTANT:", " Less.</s>")


@pytest.mark.parametrize("template", OFFICIAL)
@pytest.mark.parametrize("conversation", PROMPTS)
def test_chat_templates_render_the_same(template: str, conversation: str) -> None:
    exchanges, official = exchanges_of(conversation), OFFICIAL[template]
    expected = PROMPTS[conversation]["prompts"][template]
    messages = [
        {"role": role, "content": text}
        for pair in exchanges
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]

    def render(messages: list[dict[str, Any]], **options: Any) -> str:
        text: str = tokenizer(False).apply_chat_template(
            messages, chat_template=chat_template(official), tokenize=False, **options
        )
        return text

    assert render(messages) == "<s>" + expected["full"]
    assert render(messages[:-1], add_generation_prompt=True) == "<s>" + expected["generation"]
    own = render([{"role": "system", "content": "Be brief."}, *messages])
    assert own == "<s>" + expected["full"].replace(official.system, "Be brief.")


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
