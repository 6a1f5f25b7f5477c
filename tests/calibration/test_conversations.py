"""Instruction data of every convention in one normal form."""

import json

import datasets
import pytest

from llmpruner import DataError
from llmpruner.calibration.conversations import Completion, Conversation, Instruction, example, read_examples
from llmpruner.calibration.documents import Record

DIALOGUE = Conversation((("Two rivers?", "Elbe, Loire."), ("The longer?", "Elbe.")))
WITH_SYSTEM = Conversation(DIALOGUE.exchanges, "Be brief.")


def chat(*turns):
    return [{"role": role, "content": text} for role, text in turns]


def sharegpt(*turns):
    return [{"from": side, "value": text} for side, text in turns]


CHAT = chat(("user", "Two rivers?"), ("assistant", "Elbe, Loire."), ("user", "The longer?"), ("assistant", "Elbe."))
SHAREGPT = sharegpt(("human", "Two rivers?"), ("gpt", "Elbe, Loire."), ("user", "The longer?"), ("chatgpt", "Elbe."))
FORMS = {
    "alpaca": ({"instruction": "Add.", "input": "2 and 2", "output": "4"}, Instruction("Add.", "4", "2 and 2")),
    "alpaca with a system message": (
        {"system": "Be brief.", "instruction": "Add.", "input": "2 and 2", "output": "4"},
        Conversation((("Add.\n2 and 2", "4"),), "Be brief."),
    ),
    "alpaca without a system message": ({"system": " ", "instruction": "Add.", "output": ""}, Instruction("Add.", "")),
    "alpaca without input": ({"instruction": "Add.", "input": None, "output": ""}, Instruction("Add.", "")),
    "alpaca with its text": ({"instruction": "Add.", "output": "4", "text": "all"}, Instruction("Add.", "4")),
    "sharegpt": ({"id": "7", "conversations": SHAREGPT}, DIALOGUE),
    "sharegpt with a system turn": ({"conversations": sharegpt(("system", "Be brief.")) + SHAREGPT}, WITH_SYSTEM),
    "sharegpt with a system field": ({"conversations": SHAREGPT, "system": "Be brief."}, WITH_SYSTEM),
    "sharegpt that begins with an answer": ({"conversations": sharegpt(("gpt", "Hi!")) + SHAREGPT}, DIALOGUE),
    "sharegpt that ends with a question": ({"conversations": SHAREGPT + sharegpt(("human", "And?"))}, DIALOGUE),
    "conversations by role": ({"conversations": CHAT}, DIALOGUE),
    "conversations with nulls for the other keys": (
        {"conversations": [turn | {"role": None, "content": None} for turn in SHAREGPT]}, DIALOGUE
    ),
    "messages": ({"prompt": "Two rivers?", "messages": CHAT}, DIALOGUE),
    "messages that end with two questions": ({"messages": CHAT + chat(("user", "And?"), ("user", "And?"))}, DIALOGUE),
    "messages with a system message": ({"messages": chat(("system", "Be brief.")) + CHAT}, WITH_SYSTEM),
    "prompt and completion": (
        {"prompt": "The sky is", "completion": " blue."}, Completion(" blue.", prompt="The sky is")
    ),
    "prompt and completion of messages": ({"prompt": CHAT[:3], "completion": CHAT[3:]}, DIALOGUE),
    "text": ({"text": "The fox jumps.", "instruction": None, "output": None}, Completion("The fox jumps.")),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_one_normal_form(form):
    value, expected = FORMS[form]
    assert example(Record(value, "here")) == expected


MALFORMED = {
    "string": ("text", r"^here: expected .*; found str, without fields as \.json, \.jsonl and \.parquet"),
    "list": ([{"text": "x"}], "^here: expected .*; found list$"),
    "unknown fields": ({"question": "x"}, "^here: expected 'instruction', 'output'.* or 'text'; found 'question'$"),
    "no output": ({"instruction": "x", "output": None}, "expected 'instruction', 'output'.*; found 'instruction'$"),
    "output of another type": ({"instruction": "x", "output": 4}, "here: 'output' must be text, found int"),
    "empty instruction": ({"instruction": " ", "output": "x"}, "here: 'instruction' is empty"),
    "messages of another type": ({"messages": "x"}, "'messages' must be a list of {'role': 'user' or"),
    "unknown role": ({"messages": CHAT + chat(("tool", "x"))}, "here: message 5 must be .*its role is 'tool'"),
    "parts": ({"messages": [{"role": "user", "content": [{}]}]}, "message 1 must .*'user', and its content list"),
    "no message": ({"messages": ["x"]}, "message 1 must be .*its role is None"),
    "system later": ({"messages": CHAT + chat(("system", "x"))}, "message 5 must be .*system message as the first"),
    "system twice": (
        {"messages": chat(("system", "a")) + CHAT, "system": "b"}, "is in 'system' and in the conversation"
    ),
    "system of another type": ({"messages": CHAT, "system": 1}, "'system' must be text, found int"),
    "two questions": ({"messages": chat(("user", "a"), ("user", "b"), ("assistant", "c"))}, "answers in turn"),
    "two answers at first": ({"conversations": sharegpt(("gpt", "a"), ("gpt", "b")) + SHAREGPT}, "answers in turn"),
    "no answer": ({"messages": chat(("system", "s"), ("user", "a"))}, "an answer to the first question"),
}  # fmt: skip


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_records_are_refused_with_their_place(what):
    value, message = MALFORMED[what]
    with pytest.raises(DataError, match=message) as caught:
        example(Record(value, "here"))
    assert str(caught.value).startswith("here: ") and "\n" not in str(caught.value)


def test_examples_are_read_from_a_source_in_order(tmp_path):
    values = [value for value, _ in FORMS.values()]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    (tmp_path / "a.json").write_text(json.dumps(values))
    expected = [normal for _, normal in FORMS.values()]
    for name, kind in (("a.jsonl", "line"), ("a.json", "record")):
        places = [f"{tmp_path / name}, {kind} {number}" for number in range(1, len(values) + 1)]
        assert read_examples(str(tmp_path / name)) == list(zip(places, expected, strict=True))


def test_rows_of_a_table_are_examples_although_nulls_fill_them_up(tmp_path):
    values = [FORMS[form][0] for form in ("alpaca", "sharegpt", "messages", "text")]
    fields = ("instruction", "input", "output", "conversations", "messages", "text")
    table = datasets.Dataset.from_list([{name: value.get(name) for name in fields} for value in values])
    table.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(values))
    one, other = (read_examples(str(tmp_path / f"a.{kind}")) for kind in ("parquet", "json"))
    assert [found for _, found in one] == [found for _, found in other]


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"text": "x"}\n\n{"question": "x"}', r"line 3: expected 'instruction'"), ("\n", r"a\.jsonl has no examples")],
)
def test_bad_files_are_refused_with_file_and_line(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_examples(str(tmp_path / "a.jsonl"))
