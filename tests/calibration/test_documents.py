"""The one reader of text, records and examples: every kind of source and convention, and one line for every mistake."""

import json
import sys
from pydoc_data.topics import topics

import datasets
import pytest

from llmpruner import DataError
from llmpruner.calibration.conversations import Completion, Conversation, Instruction, example, read_examples
from llmpruner.calibration.documents import (
    PYDOC,
    Record,
    check_source,
    mixed,
    parse_mixture,
    read_documents,
    read_records,
    read_text,
)
from llmpruner.errors import MissingExtraError

ROWS = [{"text": "one"}, {"page": "two"}, {"content": "three"}, "four", {"text": " \n"}]
ROWS += [{"text": None, "content": "c", "page": "five"}]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def lines(rows, **options):
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


def parquet(path, rows):
    datasets.Dataset.from_list(rows).to_parquet(path, batch_size=2)
    return str(path)


def test_text_is_looked_for_in_each_field_in_json_and_jsonl_alike(tmp_path):
    listed = write(tmp_path / "a.json", json.dumps(ROWS, indent=1))
    lined = write(tmp_path / "a.JSONL", lines(ROWS))
    assert read_documents(listed) == read_documents(lined) == ["one", "two", "three", "four", "five"]
    assert read_text(lined) == "one\n\ntwo\n\nthree\n\nfour\n\nfive"


def test_records_come_with_their_place(tmp_path):
    lined = write(tmp_path / "a.jsonl", '{"a": 1}\r\n\r\n  \n[2]')
    assert list(read_records(lined)) == [Record({"a": 1}, f"{lined}, line 1"), Record([2], f"{lined}, line 4")]
    listed = write(tmp_path / "a.json", '[{"a": 1}, 2]')
    assert [place for _, place in read_records(listed)] == [f"{listed}, record 1", f"{listed}, record 2"]
    alone = write(tmp_path / "b.json", '{"text": "alone"}')
    assert list(read_records(alone)) == [Record({"text": "alone"}, f"{alone}, record 1")]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085", "\u000b", "\u001c"])
def test_a_jsonl_line_ends_at_a_line_feed_alone(tmp_path, character):
    text = f"before{character}after"
    # JSON allows all but control characters below U+0020 unescaped in a string.
    source = write(tmp_path / "a.jsonl", lines([{"text": text}, {"text": "x"}], ensure_ascii=character < " "))
    assert read_documents(source) == [text, "x"]
    plain = write(tmp_path / "a.txt", text)
    assert read_documents(plain) == [text]


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, name):
    content = "né" if name == "a.txt" else json.dumps({"text": "né"}, ensure_ascii=False)
    assert read_documents(write(tmp_path / name, content.encode("utf-8-sig"))) == ["né"]


def test_other_files_are_one_text_as_it_stands_but_for_line_ends(tmp_path):
    for name in ("a.txt", "a.md", "a.rst", "noted"):
        assert read_documents(write(tmp_path / name, " one\r\ntwo\rthree\n\n")) == [" one\ntwo\nthree\n\n"]


def test_parquet_rows_are_records(tmp_path):
    rows = [{"text": f"text {n}", "turns": [{"role": "user", "content": "é"}]} for n in range(5)]
    source = parquet(tmp_path / "a.parquet", rows)
    assert list(read_records(source)) == [Record(row, f"{source}, row {n}") for n, row in enumerate(rows, start=1)]
    assert read_documents(source) == [row["text"] for row in rows]
    check_source(source)


def test_pydoc_is_the_text_of_the_help_topics():
    assert read_text(PYDOC) == "\n\n".join(topics[name] for name in sorted(topics))
    assert next(read_records(PYDOC)).place.startswith("pydoc, topic 'assert")
    check_source(PYDOC)


@pytest.mark.parametrize("name", ["a,b.txt", "squad:plain:train", "a[1]*.jsonl", "wikitext"])
def test_a_file_that_exists_is_read_whatever_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name, '"here"')
    assert read_text(name).strip('"') == "here"
    check_source(name)


@pytest.mark.parametrize(
    ("source", "called"),
    [
        ("org/name", (("org/name",), "train")),
        ("name:config", (("name", "config"), "train")),
        ("name:config:test", (("name", "config"), "test")),
        ("name::train[:10%]", (("name",), "train[:10%]")),
    ],
)
def test_a_data_set_is_named_with_its_config_and_split(monkeypatch, source, called):
    calls = []

    def load(*name, split):
        calls.append((name, split))
        return datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [place for _, place in read_records(source)] == [f"data set {source}, row {n}" for n in (1, 2)]
    assert read_documents(source) == ["one", "two"]
    assert calls == [called, called]


def test_a_data_set_that_cannot_be_loaded_is_one_line(monkeypatch):
    def fail(*name, split):
        raise ConnectionError("cannot reach the hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"^'some/thing' is no file here.*name:config:split\): cannot reach the hub$"):
        read_documents("some/thing")


def test_libraries_that_are_not_installed_are_named(monkeypatch, tmp_path):
    source = parquet(tmp_path / "a.parquet", [{"text": "x"}])
    monkeypatch.setitem(sys.modules, "datasets", None)
    for read in (check_source, read_documents):
        with pytest.raises(MissingExtraError, match=r"^datasets is not installed; run in .*\.\[recover\]"):
            read("some/thing")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for read in (check_source, read_documents):
        with pytest.raises(MissingExtraError, match=r"^pyarrow is not installed; run in .*\.\[recover\]"):
            read(source)


MALFORMED = {
    "fields": ("a.jsonl", '{"text": "x"}\n{"body": "y", "content": ["z"]}', r"a\.jsonl, line 2: expected an object "
               r"with one of the fields text, page, content as a string, found 'body' \(str\), 'content' \(list\)"),
    "empty object": ("a.json", "{}", r"a\.json, record 1: expected an object .*, found dict"),
    "broken line": ("a.jsonl", '{"text": "x"}\n\n{"text": \n', r"a\.jsonl, line 3: not valid JSON \(Expecting value\)"),
    "broken list": ("a.json", '[\n{"text": "x"}\n{}]', r"a\.json, line 3: not valid JSON"),
    "lines": ("a.json", '{"text": "x"}\n{"text": "y"}', r"line 2: not valid JSON \(Extra data\); name it \.jsonl if"),
    "scalar": ("a.json", '"x"', r"a\.json: expected a JSON list of records, or one record, found str"),
    "bytes": ("a.txt", b"ab\xff", r"a\.txt: not UTF-8 text \(byte 2\); save it as UTF-8 text"),
    "bytes in a line": ("a.jsonl", b'"x"\n"\xff"\n', r"a\.jsonl, line 2: not UTF-8 text \(byte 1\)"),
    "blank": ("a.txt", " \n", r"a\.txt holds no text"),
    "empty list": ("a.json", "[]", r"a\.json holds no text"),
    "no table": ("a.parquet", "x,y", r"a\.parquet: not a readable Parquet file: "),
}  # fmt: skip


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_files_are_named_with_the_place(tmp_path, what):
    name, content, message = MALFORMED[what]
    source = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        read_documents(source)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_character_written_as_two_escapes_is_read_and_half_of_one_is_a_question_mark(tmp_path):
    texts = '{"text": "\\ud83d\\ude00"}\n{"text": "cut: \\ud83d"}'
    assert read_documents(write(tmp_path / "a.jsonl", texts)) == ["😀", "cut: ?"]


MISSING = {
    "nowhere.txt": r"nowhere\.txt: no such file; expected a \.txt, \.json, \.jsonl or \.parquet file, .*or 'pydoc'",
    "nowhere.txt:train": "no such file",
    "chat:nowhere.jsonl": "chat:nowhere.jsonl: no such file",
    "../nowhere": "no such file",
    "": "the source of data: no such file",
    ".": "a folder or a model, and no text",
    "/dev/null": "no such file",
}


@pytest.mark.parametrize("source", MISSING, ids=lambda source: source[:20] or "empty")
def test_what_does_not_exist_is_refused_by_the_call(source):
    for read in (check_source, read_records):
        with pytest.raises(DataError, match=MISSING[source]):
            read(source)


def test_the_early_check_reads_no_further_than_the_first_record(tmp_path):
    source = write(tmp_path / "a.jsonl", '\n{"text": "x"}\nnot json')
    seen = []
    check_source(source, seen.append)
    assert seen == [Record({"text": "x"}, f"{source}, line 2")]
    with pytest.raises(DataError, match="line 3: not valid JSON"):
        read_documents(source)


def test_sources_and_shares(tmp_path, monkeypatch):
    assert parse_mixture("a.jsonl") == [("a.jsonl", None)]
    assert parse_mixture("a.jsonl, name:config:train") == [("a.jsonl", None), ("name:config:train", None)]
    assert parse_mixture("3*a.jsonl,b.jsonl") == [("a.jsonl", 3.0), ("b.jsonl", 1.0)]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2*a,b.jsonl").write_text("{}")
    assert parse_mixture("2*a,b.jsonl") == [("2*a,b.jsonl", None)]
    with pytest.raises(DataError, match="a share of 0 takes nothing of 'b'"):
        parse_mixture("a,0*b")
    with pytest.raises(DataError, match="a source with an empty name"):
        parse_mixture("a,,b")


def test_shares_take_as_many_as_there_can_be():
    one, other = list(range(100)), list(range(100, 120))
    assert mixed([(None, one), (None, other)], 0) == one + other
    found = mixed([(3.0, one), (1.0, other)], 0)
    assert (len([n for n in found if n < 100]), len([n for n in found if n >= 100])) == (60, 20)
    assert found == sorted(found) and found == mixed([(3.0, one), (1.0, other)], 0)
    assert found != mixed([(3.0, one), (1.0, other)], 1)


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


NO_EXAMPLES = {
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


@pytest.mark.parametrize("what", NO_EXAMPLES)
def test_malformed_records_are_refused_with_their_place(what):
    value, message = NO_EXAMPLES[what]
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
