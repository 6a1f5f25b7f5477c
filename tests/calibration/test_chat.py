"""Chat formats: the tokenizer's template wherever there is one, for prompts and for training alike."""

import json
from itertools import groupby
from pathlib import Path

import pytest
import tiny_models
from transformers import PreTrainedTokenizerFast

from llmpruner import ChatFormat, DataError, ModelFamily
from llmpruner.calibration.chat import IGNORED, TrainingText, chat_prompt, labelled, training_texts
from llmpruner.calibration.conversations import Completion, Conversation, Instruction
from llmpruner.models.chat_format import alpaca_prompt
from llmpruner.recovery.data import prepare, read_data
from llmpruner.settings import RecoverSettings

FAMILY = ModelFamily()
TEMPLATES = {
    file.stem: file.read_text(encoding="utf-8").rstrip("\n")
    for file in sorted((Path(__file__).parents[1] / "data" / "chat_templates").glob("*.jinja"))
}
"""What templates of published models do, in as few lines."""
CHATML = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '[' + message['role'] + '] ' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


def chat(*turns):
    return [{"role": role, "content": text} for role, text in turns]


CHAT = chat(
    ("system", "Be brief."), ("user", "Two rivers?"), ("assistant", "Elbe, Loire."), ("user", "The longer?"),
    ("assistant", "Elbe."),
)  # fmt: skip


class OwnFormat(ChatFormat):
    def format_prompt(self, question):
        return f"Q: {question} A:"


class Own(ModelFamily):
    chat_format = OwnFormat()


def tokenizer(template=None):
    made = tiny_models.tokenizer()
    made.add_bos_token = True
    made.chat_template = template
    return made


class Slow(PreTrainedTokenizerFast):
    """Gives no offsets."""

    is_fast = False

    def __call__(self, text, **options):
        assert "return_offsets_mapping" not in options
        return super().__call__(text, **options)


def trained(row, chosen):
    """The stretches of text that are trained on."""
    assert all(label in (token, IGNORED) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    stretches = groupby(row["labels"], key=lambda label: label != IGNORED)
    return [chosen.decode(list(labels)) for is_trained, labels in stretches if is_trained]


def rows(example, chosen):
    return [labelled(text, chosen, 512) for text in training_texts(example, FAMILY, chosen)]


def conversation(messages):
    """Of questions and answers in turn, after a system message or none."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    turns = [message["content"] for message in messages if message["role"] != "system"]
    return Conversation(tuple(zip(turns[::2], turns[1::2], strict=True)), *system)


def test_a_prompt_is_in_the_template_where_there_is_one_and_no_format_of_the_family():
    expected = "<s>[user] Add them.\n2, 2</s>\n[assistant] "
    assert chat_prompt(FAMILY, tokenizer(CHATML), "Add them.\n2, 2") == (expected, True)
    assert chat_prompt(FAMILY, tokenizer({"default": CHATML, "tools": ""}), "Add them.\n2, 2") == (expected, True)
    alpaca = (alpaca_prompt("Add them.\n2, 2"), False)
    for none in (None, "", {"tools": CHATML}):
        assert chat_prompt(FAMILY, tokenizer(none), "Add them.\n2, 2") == alpaca
    assert chat_prompt(Own(), tokenizer(CHATML), "Add them.\n2, 2") == ("Q: Add them.\n2, 2 A:", False)


@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
def test_every_answer_is_trained_on_from_the_end_of_its_generation_prompt(slow):
    chosen = tokenizer(CHATML)
    chosen.__class__ = Slow if slow else type(chosen)
    (row,) = rows(conversation(CHAT), chosen)
    assert row["input_ids"] == tokenizer(CHATML).apply_chat_template(CHAT)["input_ids"]
    assert row["input_ids"].count(chosen.bos_token_id) == 1
    assert trained(row, chosen) == ["Elbe, Loire.</s>\n", "Elbe.</s>\n"]


def test_the_prompt_that_is_trained_on_is_the_one_that_is_asked():
    chosen = tokenizer(CHATML)
    (text,) = training_texts(Instruction("Add them.", "4", "2, 2"), FAMILY, chosen)
    assert text.turns[0][0] == chat_prompt(FAMILY, chosen, "Add them.\n2, 2").text
    assert text == TrainingText((("<s>[user] Add them.\n2, 2</s>\n[assistant] ", "4</s>\n"),), True)
    talk = conversation(CHAT[1:])
    (_, (second, _)) = prompts_and_answers(training_texts(talk, FAMILY, chosen))
    assert second == chat_prompt(FAMILY, chosen, "The longer?", talk.exchanges[:1]).text
    (text,) = training_texts(Instruction("Add them.", "4", "2, 2"), Own(), chosen)
    assert text == TrainingText(((chat_prompt(Own(), chosen, "Add them.\n2, 2").text, " 4</s>"),))
    (text,) = training_texts(Instruction("Add them.", "4", "2, 2"), FAMILY, tokenizer())
    assert text == TrainingText(((alpaca_prompt("Add them.", "2, 2"), "4</s>"),))


def test_a_template_that_changes_its_beginning_for_a_question_begins_as_the_model_is_asked():
    template = "{{ 'ask' if add_generation_prompt else 'chat' }}" + CHATML
    (text,) = training_texts(conversation(CHAT), FAMILY, tokenizer(template))
    rendered = "".join(f"[{message['role']}] {message['content']}</s>\n" for message in CHAT)
    assert "".join(prompt + answer for prompt, answer in text.turns) == "ask<s>" + rendered
    assert [answer for _, answer in text.turns] == ["Elbe, Loire.</s>\n", "Elbe.</s>\n"]


def test_text_and_completions_get_no_template():
    chosen = tokenizer(CHATML)
    (row,) = rows(Completion(" blue.", prompt="The sky is"), chosen)
    assert chosen.decode(row["input_ids"]) == "<s>The sky is blue.</s>"
    assert trained(row, chosen) == [" blue.</s>"]


def test_without_a_template_a_system_message_stands_before_the_first_prompt():
    (text,) = training_texts(conversation(CHAT), FAMILY, tokenizer())
    first = (f"Be brief.\n\n{alpaca_prompt('Two rivers?')}", "Elbe, Loire.</s>")
    assert text == TrainingText((first, (alpaca_prompt("The longer?"), "Elbe.</s>")))


def test_a_conversation_that_the_template_refuses_is_named(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"messages": talk} for talk in (CHAT[1:], CHAT)]))
    with pytest.raises(DataError, match=r"a\.json, record 2: the chat template of .*: System role not supported$"):
        prepare(RecoverSettings(data=str(file)), read_data(str(file)), FAMILY, tokenizer(TEMPLATES["gemma"]))


@pytest.mark.parametrize("call", ["strftime_now('%d %b %Y')", 'strftime_now( "%d %b %Y" )'])
def test_a_template_that_prints_the_date_prints_the_same_every_day(call):
    chosen = tokenizer("{% if strftime_now is defined %}{{ " + call + " }}{% endif %}" + CHATML)
    assert chat_prompt(FAMILY, chosen, "x").text.startswith("26 Jul 2024<s>")


SYSTEM = chat(("system", "Answer in French."))
ONE = chat(("user", "Say hello"), ("assistant", "Bonjour"))
THREE = ONE + chat(
    ("user", "And <b>bold</b>?"),
    ("assistant", "<b>Salut</b>"),
    ("user", "Which letter is in both?"),
    ("assistant", "s"),
)
CHATS = {
    "one": ONE,
    "one with system": SYSTEM + ONE,
    "three": THREE,
    "three with system": SYSTEM + THREE,
    "an answer with blanks around": SYSTEM + chat(("user", "Say hello "), ("assistant", "\n Bonjour \n")),
    "the answer is the question": SYSTEM + chat(("user", "Bonjour"), ("assistant", "Bonjour")),
}


def asked(chosen, messages):
    """The prompt of a model that is asked the last of ``messages``."""
    return chosen.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def prompts_and_answers(texts):
    """The text before every answer, and the answer."""
    found = []
    for text in texts:
        before = ""
        for prompt, answer in text.turns:
            found.append((before + prompt, answer))
            before += prompt + answer
    return found


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_has_the_prompt_that_the_model_gets_for_it(name, chat):
    messages, chosen = CHATS[chat], tokenizer(TEMPLATES[name])
    if name == "gemma":  # refuses system messages
        messages = [message for message in messages if message["role"] != "system"]
    texts = training_texts(conversation(messages), FAMILY, chosen)
    found = prompts_and_answers(texts)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(found) == len(answers)
    for number, (prompt, answer) in zip(answers, found, strict=True):
        question, content = messages[number - 1]["content"], messages[number]["content"].strip()
        wanted = asked(chosen, messages[:number])
        assert prompt == (wanted.removesuffix("<think>\n") if name == "deepseek-r1" else wanted)
        assert answer.removeprefix("<think>\n\n</think>\n\n").strip().startswith(content)
        assert content == question or question not in answer
    marked = [text for row in rows(conversation(messages), chosen) for text in trained(row, chosen)]
    assert len(marked) == len(answers)
    for number, text in zip(answers, marked, strict=True):
        assert messages[number]["content"].strip() in text and "ello" not in text and "letter" not in text


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("qwen3", "<think>\nShort.\n</think>\n\nBonjour<|im_end|>\n"),
        ("deepseek-r1", "\n\nBonjour<｜end▁of▁sentence｜>"),
        ("chatml", "<think>\nShort.\n</think>\n\nBonjour<|im_end|>\n"),
    ],
)
def test_an_answer_with_a_reasoning_is_what_the_template_makes_of_it(name, wanted):
    talk = ONE[:1] + chat(("assistant", "<think>\nShort.\n</think>\n\nBonjour"))
    ((_, answer),) = prompts_and_answers(training_texts(conversation(talk), FAMILY, tokenizer(TEMPLATES[name])))
    assert answer == wanted


@pytest.mark.parametrize("end", ["", "{{ eos_token }}"])
def test_a_template_that_renders_no_answers_is_refused(end):
    chosen = tokenizer(
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}{% endif %}{% endfor %}"
        + end
    )
    with pytest.raises(DataError, match="the chat template of the model's tokenizer renders no answers"):
        training_texts(conversation(ONE), FAMILY, chosen)
