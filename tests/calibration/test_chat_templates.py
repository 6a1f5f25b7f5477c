"""Training texts in the templates of published models: the prompt of an answer is what the model gets in use."""

from __future__ import annotations

import pytest
from chat_templates import OPENERS, TEMPLATES, WITHOUT_SYSTEM
from test_chat import FAMILY, rows, tokenizer, trained

from llmpruner import DataError
from llmpruner.calibration.chat import chat_prompt, training_texts
from llmpruner.calibration.conversations import Conversation, Instruction, Message

SYSTEM = Message("system", "Answer in French.")
ONE = (Message("user", "Say hello"), Message("assistant", "Bonjour"))
THREE = (
    *ONE,
    Message("user", "And <b>bold</b>?"),
    Message("assistant", "<b>Salut</b>"),
    Message("user", "Which letter is in both?"),
    Message("assistant", "s"),
)
CHATS = {
    "one": ONE, "one with system": (SYSTEM, *ONE), "three": THREE, "three with system": (SYSTEM, *THREE),
    "an answer with blanks around": (SYSTEM, Message("user", "Say hello "), Message("assistant", "\n Bonjour \n")),
    "the answer is the question": (SYSTEM, Message("user", "Bonjour"), Message("assistant", "Bonjour")),
}  # fmt: skip


def asked(chosen, messages):
    """The prompt of a model that is asked the last of ``messages``."""
    made = [{"role": message.role, "content": message.content} for message in messages]
    return chosen.apply_chat_template(made, tokenize=False, add_generation_prompt=True)


def prompts_and_answers(texts):
    """The text before every answer, and the answer."""
    found = []
    for text in texts:
        before = ""
        for turn in text.turns:
            found.append((before + turn.prompt, turn.answer))
            before += turn.prompt + turn.answer
    return found


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_has_the_prompt_that_the_model_gets_for_it(name, chat):
    messages, chosen = CHATS[chat], tokenizer(TEMPLATES[name])
    if name in WITHOUT_SYSTEM:
        messages = tuple(message for message in messages if message.role != "system")
    texts = training_texts(Conversation(messages), FAMILY, chosen)
    found = prompts_and_answers(texts)
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    assert len(found) == len(answers)
    for number, (prompt, answer) in zip(answers, found, strict=True):
        question, content = messages[number - 1].content, messages[number].content.strip()
        wanted = asked(chosen, messages[:number])
        assert prompt == wanted.removesuffix(OPENERS.get(name, ""))
        assert answer.removeprefix("<think>\n\n</think>\n\n").strip().startswith(content)
        assert content == question or question not in answer
    marked = [text for row in rows(Conversation(messages), chosen) for text in trained(row, chosen)]
    assert len(marked) == len(answers)
    for number, text in zip(answers, marked, strict=True):
        assert messages[number].content.strip() in text and "ello" not in text and "letter" not in text


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_of_training_are_those_of_instructions_and_chats(name):
    chosen, opener = tokenizer(TEMPLATES[name]), OPENERS.get(name, "")
    ((prompt, _),) = prompts_and_answers(training_texts(Instruction("Add.", "4", "2, 2"), FAMILY, chosen))
    assert prompt == chat_prompt(FAMILY, chosen, "Add.\n2, 2").text.removesuffix(opener)
    exchanges = list(zip((m.content for m in THREE[::2]), (m.content for m in THREE[1::2]), strict=True))
    found = prompts_and_answers(training_texts(Conversation(THREE), FAMILY, chosen))
    for number, (prompt, _) in enumerate(found):
        wanted = chat_prompt(FAMILY, chosen, exchanges[number][0], exchanges[:number])
        assert prompt == wanted.text.removesuffix(opener)


def test_a_system_message_of_a_last_question_is_in_the_text_of_every_answer():
    texts = training_texts(Conversation((SYSTEM, *THREE[:4])), FAMILY, tokenizer(TEMPLATES["Mistral v0.3"]))
    first, second = ("".join(turn.prompt + "|" + turn.answer for turn in text.turns) for text in texts)
    assert first == "<s>[INST] Answer in French.\n\nSay hello[/INST]| Bonjour</s>"
    assert second == (
        "<s>[INST] Say hello[/INST] Bonjour</s>[INST] Answer in French.\n\nAnd <b>bold</b>?[/INST]| <b>Salut</b></s>"
    )


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("Qwen3", "<think>\nShort.\n</think>\n\nBonjour<|im_end|>\n"),
        ("DeepSeek-R1", "\n\nBonjour<｜end▁of▁sentence｜>"),
        ("ChatML", "<think>\nShort.\n</think>\n\nBonjour<|im_end|>\n"),
    ],
)
def test_an_answer_with_a_reasoning_is_what_the_template_makes_of_it(name, wanted):
    chat = (ONE[0], Message("assistant", "<think>\nShort.\n</think>\n\nBonjour"))
    ((_, answer),) = prompts_and_answers(training_texts(Conversation(chat), FAMILY, tokenizer(TEMPLATES[name])))
    assert answer == wanted


@pytest.mark.parametrize("end", ["", "{{ eos_token }}"])
def test_a_template_that_renders_no_answers_is_refused(end):
    chosen = tokenizer(
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}{% endif %}{% endfor %}"
        + end
    )
    with pytest.raises(DataError, match="the chat template of the model's tokenizer renders no answers"):
        training_texts(Conversation(ONE), FAMILY, chosen)
