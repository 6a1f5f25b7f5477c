"""Examples that the dense model writes: how many, from what, in which format, and once only."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from said import Said

from llmpruner import api
from llmpruner.calibration.written import answered
from llmpruner.discovery.family import AutoFamily
from llmpruner.errors import DataError, LlmprunerError, ModelError, OutputError, SettingsError
from llmpruner.recovery import dense_text
from llmpruner.recovery.dense_text import ROWS, DenseText, WrittenRows, dense_text_in, instructions, up_to_sentence
from llmpruner.settings import RunSettings

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def test_the_instructions_are_many_and_distinct():
    found = instructions()
    assert 250 <= len(found) <= 400 and len({one.lower() for one in found}) == len(found)
    assert all(one == one.strip() and 8 < len(one) < 250 for one in found)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("self", DenseText("self", ROWS // 4, 3 * ROWS // 4)), ("self:40", DenseText("self:40", 10, 30)),
        ("a.jsonl", None), ("3*a.jsonl,1*self:8", DenseText("self:8", 2, 6)), ("myself", None), ("selfish/data", None),
        ("self-text", DenseText("self-text", 0, ROWS)), ("a.jsonl,self-text:8", DenseText("self-text:8", 0, 8)),
        ("self:1", DenseText("self:1", 1, 0)), ("self:3", DenseText("self:3", 1, 2)), ("self-texts", None),
    ],
)  # fmt: skip
def test_the_source_and_its_number_of_rows(data, expected):
    assert dense_text_in(data) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("self:", "--data self:: expected 'self', or 'self:N'"), ("self:0", "expected 'self', or 'self:N'"),
        ("self:ten", "expected 'self', or 'self:N'"), ("self,2*self:4", "name 'self' or 'self-text' once"),
        ("self-text:0", "expected 'self-text', or 'self-text:N'"), ("self,self-text", "writes one part of the data"),
    ],
)  # fmt: skip
def test_mistakes_are_named(data, message):
    with pytest.raises(DataError, match=message):
        dense_text_in(data)


def test_a_file_of_that_name_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").write_text("")
    assert dense_text_in("self") is None


def test_text_ends_with_a_sentence():
    assert up_to_sentence("One. Two! And th") == "One. Two!"
    assert up_to_sentence("a list\n- b\n\nand the") == "a list\n- b"
    assert up_to_sentence("no end") == "no end"


def test_answers_follow_the_numbers_of_their_row(random_model, monkeypatch):
    """The token of a step is where the cumulative probability exceeds the row's number, whatever the padding."""
    monkeypatch.setattr("llmpruner.models.numbers.computes_bfloat16_fast", lambda model: False)
    tokenizer = tiny_models.tokenizer()
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    numbers = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    found = answered(random_model, tokenizer, prompts, numbers)
    for prompt, row, answer in zip(prompts, numbers, found, strict=True):
        ids = list(prompt)
        for number in row:
            with torch.no_grad():
                upto = random_model(torch.tensor([ids])).logits[0, -1].float().softmax(-1).cumsum(-1)
            token = int((upto <= float(number) * float(upto[-1])).sum())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
        assert answer == ids[len(prompt) :]
    assert found == answered(random_model, tokenizer, prompts, numbers)


@pytest.fixture(scope="module")
def random_model():
    model = tiny_models.llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["family's format", "template"])
def home(request, tmp_path_factory, random_model):
    """A folder with a dense and a pruned model, with a chat template or without."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = tiny_models.tokenizer()
    if request.param:
        tokenizer.chat_template = TEMPLATE
    random_model.save_pretrained(home / "dense")
    tokenizer.save_pretrained(home / "dense")
    api.prune(str(home / "dense"), output=home / "pruned", ratio=0.2, importance="l1", compensate="none")
    return home


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(dense_text, "ANSWER_TOKENS", 8)
    monkeypatch.setattr(dense_text, "TEXT_TOKENS", 6)
    monkeypatch.setattr(dense_text, "_BATCH", 4)


def recover(home, output, data="self:24", **options):
    values = {"max_steps": 1, "batch_size": 4, "cutoff": 256, "strategy": "lora", **options}
    return api.recover(str(home / "pruned"), data=data, output=output, **values)


def written(folder):
    head, *rows = map(json.loads, (folder / "self-written.jsonl").read_text().splitlines())
    return head, rows


def test_a_model_recovers_without_a_corpus(home, tmp_path):
    said = Said()
    found = recover(home, tmp_path / "out", work_dir=tmp_path / "work", progress=said)
    head, rows = written(tmp_path / "work")
    assert head["whole"] and (head["answers"], head["texts"], head["batches"]) == (6, 18, 3)
    asked = [row["instruction"] for row in rows if "instruction" in row]
    assert set(asked) <= set(instructions()) and len(set(asked)) == len(asked) and 4 <= len(asked) <= 6
    assert 14 <= sum("text" in row for row in rows) <= 18
    record = found.record["recovery"][0]
    assert record["data"] == "self:24" and record["examples"] == len(rows)
    plain = [line for line in said.lines if "has no chat format: instructions are in" in line]
    assert len(plain) == (0 if "chat_template" in str(list((home / "dense").iterdir())) else 1)


def test_an_interrupted_job_goes_on_with_the_same_rows(home, tmp_path, monkeypatch):
    recover(home, tmp_path / "whole", work_dir=tmp_path / "whole-work")
    rows = dense_text._Writer.rows

    def interrupted(self, number):
        if number == 1:
            raise KeyboardInterrupt
        return rows(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(dense_text._Writer, "rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            recover(home, tmp_path / "parts", work_dir=tmp_path / "parts-work")
    head, found = written(tmp_path / "parts-work")
    assert head["batches"] == 1 and not head["whole"] and found
    done = []
    monkeypatch.setattr(dense_text._Writer, "rows", lambda self, number: (done.append(number), rows(self, number))[1])
    recover(home, tmp_path / "parts", work_dir=tmp_path / "parts-work")
    assert done == [1, 2]
    assert written(tmp_path / "parts-work") == written(tmp_path / "whole-work")
    # Now nothing is written, and the dense model is not loaded.
    monkeypatch.setattr(
        "llmpruner.recipes.recovering.open_dense", lambda *_, **__: pytest.fail("the dense model was loaded")
    )
    recover(home, tmp_path / "again", work_dir=tmp_path / "parts-work")
    with pytest.raises(OutputError, match="state of another recovery job"):
        recover(home, tmp_path / "other", work_dir=tmp_path / "parts-work", seed=3)


def test_texts_alone_need_no_chat_format(home, tmp_path):
    said = Said()
    found = recover(home, tmp_path / "out", "self-text:6", work_dir=tmp_path / "work", progress=said)
    head, rows = written(tmp_path / "work")
    assert (head["answers"], head["texts"], head["batches"]) == (0, 6, 1) and all(set(row) == {"text"} for row in rows)
    assert found.record["recovery"][0]["data"] == "self-text:6"
    assert not any("chat template" in line for line in said.lines)


def test_a_mixture_and_another_strategy(home, tmp_path):
    file = tmp_path / "file.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"{n}? ", "completion": "Paris."}) for n in range(12)))
    found = recover(
        home, tmp_path / "out", data=f"3*{file},1*self:4", strategy="distil", work_dir=tmp_path / "work",
        run=RunSettings(restart=True),
    )  # fmt: skip
    count = len(written(tmp_path / "work")[1])
    assert found.record["recovery"][0]["examples"] == 4 * count


def test_a_model_that_was_not_pruned_is_refused_before_it_is_loaded(home, tmp_path, monkeypatch):
    monkeypatch.setattr("llmpruner.recipes.opening.Opener.weights", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ModelError, match="was not pruned by llmpruner, so no dense model is known"):
        api.recover(str(home / "dense"), data="self", output=tmp_path / "out")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="--data self:4 runs in one process"):
        recover(home, tmp_path / "out", data="self:4")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_writes_blanks_is_named(random_model, tmp_path, monkeypatch):
    monkeypatch.setattr(dense_text._Writer, "_decoded", lambda *_, **__: "")
    from llmpruner_llama.family import LlamaFamily

    text = DenseText("self:4", 1, 3)
    rows = WrittenRows(tmp_path / "rows.jsonl", text.identity("tiny", 0))
    with pytest.raises(DataError, match="writes nothing but blanks"):
        rows.write(text, random_model, tiny_models.tokenizer(), LlamaFamily(), 0)


MISTAKES = {
    "a malformed row": ({"data": "self:8,{bad}"}, "bad.jsonl, line 2"),
    "malformed data for validation": ({"validation_data": "{bad}"}, "bad.jsonl, line 2"),
    "nothing left to train on": ({"validation": 600}, "--validation takes 600 of them"),
    "a warm-up without end": ({"warmup_steps": 5000}, "--warmup-steps 5000: the training has"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_found_before_anything_is_written(what, home, tmp_path, monkeypatch):
    (tmp_path / "bad.jsonl").write_text('{"text": "The fox."}\n{"txt": "The dog."}\n')
    options, message = MISTAKES[what]
    filled = {k: v.format(bad=tmp_path / "bad.jsonl") if isinstance(v, str) else v for k, v in options.items()}
    monkeypatch.setattr("llmpruner.recipes.recovering.open_dense", lambda *_, **__: pytest.fail("loaded"))
    values = {"data": "self:8", "strategy": "lora", "batch_size": 4, "output": tmp_path / "out", **filled}
    with pytest.raises(LlmprunerError, match=message):
        api.recover(str(home / "pruned"), **values)
    assert not (tmp_path / "out.recovery").exists()


def test_rows_with_other_ends_of_lines_are_read_again(home, tmp_path):
    recover(home, tmp_path / "one", work_dir=tmp_path / "work")
    file = tmp_path / "work" / "self-written.jsonl"
    head, _, *rest = file.read_text(encoding="utf-8").split("\n")
    row = {"text": "two\u2028lines\u0085more"}
    file.write_text("\n".join([head, json.dumps(row, ensure_ascii=False), *rest]), encoding="utf-8")
    identity = {key: value for key, value in json.loads(head).items() if key not in ("batches", "whole")}
    assert dense_text.WrittenRows(file, identity).examples[0].completion == row["text"]


def test_text_of_another_dense_model_is_not_used(home, tmp_path):
    """A model with the same shapes at the same place."""
    shutil.copytree(home, tmp_path / "home")
    pruned = tmp_path / "home" / "pruned" / "llmpruner.json"
    pruned.write_text(pruned.read_text().replace(str(home), str(tmp_path / "home")))
    recover(tmp_path / "home", tmp_path / "one", work_dir=tmp_path / "work")
    file = tmp_path / "home" / "dense" / "model.safetensors"
    changed = {name: tensor * 1.01 for name, tensor in load_file(file).items()}
    save_file(changed, file, {"format": "pt"})
    with pytest.raises(OutputError, match="state of another recovery job"):
        recover(tmp_path / "home", tmp_path / "two", work_dir=tmp_path / "work")


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Folders of pruned models with a table of so many positions, and of the dense ones."""
    home = tmp_path_factory.mktemp("short")

    def made(positions):
        folder = home / str(positions)
        if not folder.exists():
            model = tiny_models.gpt2(positions)
            model.generation_config.eos_token_id = None
            model.save_pretrained(folder / "dense")
            tiny_models.tokenizer().save_pretrained(folder / "dense")
            api.prune(str(folder / "dense"), output=folder / "pruned", ratio=0.2, importance="l1", compensate="none")
        return folder

    return made


def test_texts_fit_into_few_positions(short, tmp_path, monkeypatch):
    monkeypatch.setattr(dense_text, "TEXT_TOKENS", 64)
    found = api.recover(
        str(short(16) / "pruned"), data="self-text:4", output=tmp_path / "out", work_dir=tmp_path / "work",
        strategy="lora", max_steps=1, batch_size=4,
    )  # fmt: skip
    assert found.record["recovery"][0]["examples"] == 4
    assert len(written(tmp_path / "work")[1]) == 4


@pytest.mark.parametrize("data", ["self:4", "self-text:4"])
def test_what_does_not_fit_into_the_positions_is_refused_before_it_is_written(data, short, tmp_path, monkeypatch):
    monkeypatch.setattr("llmpruner.recipes.recovering.open_dense", lambda *_, **__: pytest.fail("loaded"))
    cutoff, message = ({}, "no instruction with an answer fits into the model's 16 positions; give self-text or a file")
    if data == "self-text:4":
        cutoff, message = {"cutoff": 17}, "--cutoff 17 is beyond the 16 positions of '.*pruned'; lower it"
    with pytest.raises(DataError, match=message):
        api.recover(str(short(16) / "pruned"), data=data, output=tmp_path / "out", strategy="lora", **cutoff)
    assert not (tmp_path / "out.recovery").exists()


def test_answers_end_where_the_positions_do(monkeypatch):
    """Of the instructions, those are asked that leave room for an answer."""
    monkeypatch.setattr(dense_text, "ANSWER_TOKENS", 192)
    family, tokenizer = AutoFamily(), tiny_models.tokenizer()
    prompts = {one: len(dense_text._prompt(family, tokenizer, one)) for one in instructions()}
    limit = sorted(prompts.values())[60] + dense_text.LEAST_ANSWER + dense_text._ending(family, tokenizer)
    fitting = dense_text.fitting_instructions(family, tokenizer, limit, "self")
    assert 60 < len(fitting) < len(instructions())
    model = tiny_models.gpt2(limit)
    read = []
    monkeypatch.setattr("llmpruner.calibration.written.answered", lambda *given: read.append(given) or answered(*given))
    writer = dense_text._Writer(DenseText("self:32", 8, 24), model, tokenizer, family, 0)
    rows = [row for number in range(len(writer.batches)) for row in writer.rows(number)]
    assert rows and {row["instruction"] for row in rows} <= set(fitting)
    for _, _, asked, numbers in read:
        assert dense_text.LEAST_ANSWER <= numbers.shape[1] < 192
        assert max(map(len, asked)) + numbers.shape[1] + dense_text._ending(family, tokenizer) <= limit
