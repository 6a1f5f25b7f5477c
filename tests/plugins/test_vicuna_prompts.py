"""Vicuna's prompts to the character, and what of them is trained on (tests/data/vicuna, made with FastChat)."""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from llmpruner_vicuna.conversation import (
    TEMPLATES,
    V0_FIRST,
    V0_ONE_SHOT,
    V0_ONE_SHOT_FIRST,
    V0_ZERO_SHOT,
    V1_1,
    Turn,
)
from llmpruner_vicuna.family import VicunaFamily, VicunaV0Family
from llmpruner_vicuna.recognition import chat_template
from llmpruner_vicuna.training import encode, first_training_text, read_turns, training_text

from llmpruner import DataError
from llmpruner.families.chat import chat_prompt
from llmpruner.recovery.examples import load_examples, tokenise

DATA = Path(__file__).parents[1] / "data" / "vicuna"
PROMPTS = json.loads((DATA / "prompts.json").read_text(encoding="utf-8"))
MASKS = json.loads((DATA / "masks.json").read_text(encoding="utf-8"))
OFFICIAL = {
    "head/vicuna_v1.1": V1_1,
    "head/one_shot": V0_ONE_SHOT,
    "head/zero_shot": V0_ZERO_SHOT,
    "00d9e667/conv_one_shot": V0_ONE_SHOT_FIRST,
    "f34f28c/v1 (first release, default)": V0_FIRST,
}
RENDERED = [(c, t) for c, case in PROMPTS.items() for t, text in case["prompts"].items() if isinstance(text, dict)]


@pytest.mark.parametrize(("conversation", "template"), RENDERED)
def test_prompts_to_the_character(conversation: str, template: str) -> None:
    turns = read_turns(PROMPTS[conversation])
    expected = PROMPTS[conversation]["prompts"][template]
    ours = OFFICIAL[template]
    assert ours.render(turns) == expected["full"]
    assert ours.render([*turns[:-1], Turn("gpt", None)]) == expected["generation"]
    assert "".join(prompt + answer for prompt, answer in ours.exchanges(turns)) == expected["full"]
    if expected["stop_str"]:
        assert ours.stop == expected["stop_str"]


def test_every_official_template_is_in_the_data() -> None:
    assert {template for _, template in RENDERED} == set(OFFICIAL)


@pytest.mark.parametrize("conversation", PROMPTS)
def test_supervised_characters(conversation: str) -> None:
    case = PROMPTS[conversation]
    training = training_text(read_turns(case))
    for version in ("v1.1 HEAD", "v1.1 @00d9e667"):
        assert [list(span) for span in training.spans] == case["train"][version]["char_spans"]
    first = first_training_text(read_turns(case, keep_leading_answer=True))
    assert first.text == case["train"]["v0 @f34f28c"]["text"]
    assert [list(span) for span in first.spans] == case["train"]["v0 @f34f28c"]["char_spans"]


class WordTokenizer:
    """BOS and one token per word, to which the blank before it belongs; ``</s>`` is a token."""

    bos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[Any]]:
        words = [match.span() for match in re.finditer(r"</s>| ?(?:(?!</s>)[^ ])+| ", text)]
        return {"input_ids": list(range(len(words) + 1)), "offset_mapping": [(0, 0), *words]}


@pytest.mark.parametrize("conversation", PROMPTS)
def test_supervised_characters_after_truncation(conversation: str) -> None:
    training = training_text(read_turns(PROMPTS[conversation]))
    offsets = WordTokenizer()(training.text)["offset_mapping"]
    _, labels = encode(WordTokenizer(), training, 48)
    spans: list[list[int]] = []
    for (start, end), label in zip(offsets, labels, strict=False):
        if label >= 0 and spans and spans[-1][1] == start:
            spans[-1][1] = end
        elif label >= 0:
            spans.append([start, end])
    assert spans == PROMPTS[conversation]["train"]["v1.1 HEAD truncated at 48 words-tokens"]["char_spans"]


@cache
def tokenizer(legacy: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DATA / "tokenizer", legacy=legacy)


@pytest.mark.parametrize(("conversation", "version"), [(c, v) for c, case in MASKS.items() for v in case])
def test_ids_and_labels(conversation: str, version: str) -> None:
    training = training_text(read_turns(PROMPTS[conversation]))
    chosen = tokenizer("legacy=False" not in version)
    whole = len(encode(chosen, training)[0])
    limit = whole - 6 if version.endswith("full-6") else 256
    ids, labels = encode(chosen, training, limit, supervise_bos=version.startswith("00d9e667"))
    assert ids == MASKS[conversation][version]["input_ids"]
    assert labels == MASKS[conversation][version]["labels"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "'conversations' must be a list"),
        ({"id": "x7", "conversations": []}, "conversation 'x7': 'conversations' must be"),
        ({"conversations": [{"from": "human"}]}, "found from 'human'"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "found from 'alien'"),
        ({"conversations": ["a"]}, "found from None"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "there is no answer"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "there is no answer"),
        (
            {"conversations": [{"from": s, "value": "a"} for s in ("human", "gpt", "gpt")]},
            "turn 3 is of 'gpt' again",
        ),
        (
            {"conversations": [{"from": s, "value": "a"} for s in ("gpt", "gpt", "human", "gpt")]},
            "two answers come before the first question",
        ),
    ],
)
def test_malformed_conversations(record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_turns(record)


def test_the_families_prompt_and_train_with_their_template() -> None:
    question, answer = "What is pruning?", "Pruning removes weights from a network."
    for family, template in ((VicunaFamily(), "head/vicuna_v1.1"), (VicunaV0Family(), "head/zero_shot")):
        expected = PROMPTS["one_turn"]["prompts"][template]
        assert family.format_prompt(question) == expected["generation"]
        assert family.format_prompt("What is", "pruning?") == expected["generation"].replace("What is ", "What is\n")
        assert [prompt for prompt, _ in family.format_conversation([(question, answer)])] == [expected["generation"]]
    expected = PROMPTS["two_turns"]
    exchanges = VicunaFamily().format_conversation(
        [("Name two rivers.", "The Elbe and the Loire."), ("Which one is longer?", "The Loire, at about 1006 km.")]
    )
    assert "".join(a + b for a, b in exchanges) == expected["prompts"]["head/vicuna_v1.1"]["full"]
    assert [b for _, b in exchanges] == expected["train"]["v1.1 HEAD"]["span_texts"]


def test_the_families_format_wins_over_a_chat_template(tmp_path: Path) -> None:
    templated = copy.deepcopy(tokenizer(False))
    templated.chat_template = "{{ messages[0]['content'] }}"
    expected = PROMPTS["one_turn"]["prompts"]["head/vicuna_v1.1"]
    assert chat_prompt(VicunaFamily(), templated, "What is pruning?") == (expected["generation"], False)
    (tmp_path / "data.json").write_text(json.dumps([PROMPTS["one_turn"]]))
    (text,) = load_examples(str(tmp_path / "data.json"), VicunaFamily(), templated).texts
    assert "".join(a + b for a, b in text.turns) == expected["full"]
    assert not text.has_special_tokens


def test_a_system_message_takes_the_place_of_the_official_one() -> None:
    ((prompt, answer),) = VicunaFamily().format_conversation([("What is pruning?", "Less.")], "Be brief.")
    assert (prompt, answer) == ("Be brief. USER: What is pruning? ASSISTANT:", " Less.</s>")


@pytest.mark.parametrize("name", ["v1.1", "v0-zero-shot"])
@pytest.mark.parametrize("conversation", PROMPTS)
def test_chat_templates_render_the_same(name: str, conversation: str) -> None:
    turns = read_turns(PROMPTS[conversation])
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn.speaker], "content": turn.text} for turn in turns]
    template = TEMPLATES[name]

    def render(messages: list[dict[str, Any]], **options: Any) -> str:
        text: str = tokenizer(False).apply_chat_template(
            messages, chat_template=chat_template(template), tokenize=False, **options
        )
        return text

    assert render(messages) == "<s>" + template.render(turns)
    opened = "<s>" + template.render([*turns[:-1], Turn("gpt", None)])
    assert render(messages[:-1], add_generation_prompt=True) == opened
    own = render([{"role": "system", "content": "Be brief."}, *messages])
    assert own == "<s>" + template.render(turns).replace(template.system, "Be brief.")


@pytest.mark.parametrize("version", ["HEAD legacy=True max_length=256", "HEAD legacy=False max_length=256"])
@pytest.mark.parametrize("conversation", PROMPTS)
def test_recovery_trains_on_the_official_ids_and_labels(conversation: str, version: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([PROMPTS[conversation]]))
    chosen = tokenizer("True" in version)
    examples = load_examples(str(tmp_path / "data.json"), VicunaFamily(), chosen)
    (row,) = tokenise(examples, chosen, cutoff=256, loss_on="answers")
    assert row["input_ids"] == MASKS[conversation][version]["input_ids"]
    assert row["labels"] == MASKS[conversation][version]["labels"]
