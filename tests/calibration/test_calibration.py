"""Calibration text: written by the model, read from files or given by a plugin; reproducible, never silently short."""

import copy
import json
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise, product

import pytest
import tiny_models
import torch
from transformers import GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmpruner import DataError, UnsupportedModelError
from llmpruner.calibration import calibration, chat, written
from llmpruner.calibration.base import SampleTask
from llmpruner.calibration.calibration import (
    CalibrationJob,
    CalibrationSource,
    ChatSource,
    SelfWritten,
    TextSource,
    parse_calibration,
)
from llmpruner.component import ComponentSettings
from llmpruner.engine.execution import Execution
from llmpruner.errors import PluginError, SettingsError


class Counting(CalibrationSource):
    """A source as a plugin may add it: the numbers from ``start``."""

    name = "counting"

    class Settings(ComponentSettings):
        start: int = 0

    settings: Settings

    def sample(self, task):
        first = self.settings.start + int(task.reference or 0)
        return torch.arange(first, first + task.samples * task.length).view(task.samples, task.length)


@pytest.fixture
def wide(gqa):
    """The same model with a vocabulary for the numbers that the tokenizers of these tests give."""
    model = copy.deepcopy(gqa.network)
    model.resize_token_embeddings(6000, mean_resizing=False)
    return replace(gqa, network=model)


SOURCES = {cls.name: cls for cls in (SelfWritten, TextSource, ChatSource, Counting)}


def job_of(text, settings=None, samples=1, length=2):
    return CalibrationJob(text, parse_calibration(text, SOURCES, settings or {}), samples, length)


def drawn(text, loaded, tokenizer=None, settings=None, *, samples, length, seed):
    return job_of(text, settings, samples, length).draw(replace(loaded, tokenizer=tokenizer), samples, seed)


def parts_of(text):
    return [(part.source.name, part.reference) for part in parse_calibration(text, SOURCES, {})]


class Numbers:
    """A tokenizer of one token per word, which is its number, or 0; it puts ``opening`` before a text."""

    def __init__(self, *opening):
        self.opening = list(opening)

    def __call__(self, text, add_special_tokens, verbose):
        words = [int(word) if word.isdigit() else 0 for word in text.split()]
        return {"input_ids": self.opening * add_special_tokens + words}


def test_the_model_writes_its_own_text(gqa):
    before = torch.random.get_rng_state()
    one, same, other = (drawn("self", gqa, samples=3, length=20, seed=s) for s in (1, 1, 2))
    assert one.shape == (3, 20)
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len({tuple(row) for row in one.tolist()}) == 3
    # Settings such as Qwen2.5-Instruct's repetition penalty and BART's forced end of the sequence do not change it.
    own = gqa.network.generation_config
    gqa.network.generation_config = GenerationConfig(
        repetition_penalty=3.0, forced_eos_token_id=own.eos_token_id, bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
    )  # fmt: skip
    assert torch.equal(drawn("self", gqa, samples=3, length=20, seed=1), one)
    assert gqa.network.generation_config.repetition_penalty == 3.0


@pytest.mark.parametrize(("length", "starts"), [(2, [0]), (64, [0]), (65, [0, 33]), (128, [0, 64])])
def test_written_samples_are_made_of_passages(gqa, length, starts):
    ids = written.self_generated(gqa.network, None, 12, length, 0)
    assert ids.shape == (12, length)
    bos = gqa.network.config.bos_token_id
    begins = (ids == bos).all(0).nonzero().flatten().tolist()
    assert begins == starts
    assert len({tuple(row[start : start + 8]) for row in ids.tolist() for start in starts}) > 6 * len(starts)


def test_the_number_of_passages_at_once_changes_nothing(gqa, monkeypatch):
    together = written.self_generated(gqa.network, None, 5, 24, 3, passage=8)
    monkeypatch.setattr(written, "passages_at_once", lambda *_: 2)
    assert torch.equal(written.self_generated(gqa.network, None, 5, 24, 3, passage=8), together)


def test_written_samples_begin_as_text_in_use_does(gqa):
    """With what the tokenizer puts before a text. Where that is nothing, every second one with BOS."""

    def texts(tokenizer):
        settings = {"self": {"passage": 8}}
        return drawn("self", gqa, tokenizer, settings, samples=6, length=24, seed=3)

    bos = gqa.network.config.bos_token_id
    with gqa.weights.in_bfloat16():
        always = written.self_generated(gqa.network, None, 6, 24, 3, passage=8)
    opened, plain = texts(Numbers(7, 9)), texts(Numbers())
    assert (always == bos).all(0).nonzero().flatten().tolist() == [0, 8, 16]
    assert (opened[:, :2] == torch.tensor([7, 9])).all() and torch.equal(opened[:, 2:], always[:, :-2])
    assert torch.equal(texts(Numbers(bos)), always)
    assert torch.equal(plain[::2], always[::2])
    assert torch.equal(plain[1::2], always[1::2].roll(-4, 1)), "from the middle of the first passage"
    assert torch.equal(texts(None), plain)


def test_a_chat_model_also_answers_instructions(gqa, monkeypatch):
    """In its chat format, in every second sample; others are as without one."""
    monkeypatch.setattr("llmpruner.calibration.written.ANSWER_TOKENS", 8)
    tokenizer = tiny_models.tokenizer()
    model = replace(gqa, network=copy.deepcopy(gqa.network))
    model.network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    texts = drawn("self", model, tokenizer, samples=3, length=100, seed=0)
    short = drawn("self", model, tokenizer, samples=4, length=15, seed=0)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}] {% endfor %}"
    both = drawn("self", model, tokenizer, samples=5, length=100, seed=0)
    is_chat = torch.arange(5) % 2 == 1
    assert torch.equal(both[~is_chat], texts)
    lines = (files(written.__package__) / "instructions.txt").read_text(encoding="utf-8").splitlines()
    chats = [tokenizer.decode(row) for row in both[is_chat]]
    first = [line for chat in chats for line in lines if f"[{line}]".startswith(chat[:20])]
    assert len(first) == 2
    assert torch.equal(drawn("self", model, tokenizer, samples=4, length=15, seed=0), short), "no room"


def test_a_class_that_cannot_generate_is_refused_in_one_line(gqa, monkeypatch):
    """As Blenderbot's decoder, which looks for another cache than it is given."""

    def generate(*_, **__):
        raise IndexError("list index out of range")

    monkeypatch.setattr(gqa.network, "generate", generate)
    said = r"LlamaForCausalLM cannot generate text \(IndexError: list index out of range\); give a text with --calib"
    with pytest.raises(UnsupportedModelError, match=said):
        written.self_generated(gqa.network, None, 2, 8, 0)


def test_tokens_are_drawn_as_the_model_predicts_them():
    """Shares of 20,000 draws within four standard errors; the end and tokens of probability 0 are never drawn."""
    logits = torch.tensor([-torch.inf, 1.0, 50.0, 0.0, 2.0, -torch.inf])
    draw = written._Draw(torch.rand(20000, 2, generator=torch.Generator().manual_seed(0)), never=[2, 99])
    chosen = draw(torch.zeros(20000, 2), logits.repeat(20000, 1)).argmax(-1)
    shares = torch.bincount(chosen, minlength=6) / 20000
    logits[2] = -torch.inf
    wanted = logits.softmax(-1)
    assert ((shares - wanted).abs() <= 4 * (wanted * (1 - wanted) / 20000).sqrt()).all()


def test_passages_begin_as_often_with_a_token_as_the_model_predicts_at_temperature_4(gqa):
    """Within a passage for each stretch of the scrambled points, where independent draws spread by their root."""
    ids = written.self_generated(gqa.network, None, 128, 8, 0)
    with torch.no_grad():
        logits = gqa.network(ids[:1, :1]).logits[0, 0] / 4
    eos = gqa.network.generation_config.eos_token_id
    assert not bool((ids == eos).any())
    logits[eos] = -torch.inf
    wanted = 128 * logits.softmax(-1)
    counts = torch.bincount(ids[:, 1], minlength=len(wanted))
    assert float((counts - wanted).abs().max()) <= 2


@pytest.mark.parametrize("documents", [1, 40])
def test_windows_do_not_overlap_while_there_is_text(wide, tmp_path, documents):
    size = 4800 // documents
    rows = [" ".join(f"{n:04}" for n in range(d * size, (d + 1) * size)) for d in range(documents)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))

    def windows(samples):
        found = drawn(str(tmp_path / "a.jsonl"), wide, Numbers(), samples=samples, length=16, seed=0)
        breaks = sum(b != a + 1 for row in found.tolist() for a, b in pairwise(row))
        assert breaks == 0 if documents == 1 else breaks < samples
        return found.flatten().tolist()

    few, most, more = windows(10), windows(240), windows(500)
    assert len(set(few)) == 160 and max(few) - min(few) > 2400
    assert len(set(most)) == len(most) == 240 * 16
    assert len(more) == 500 * 16 > len(set(more)) > 240 * 16


def test_windows_of_text_begin_with_what_the_tokenizer_puts_before_it(gqa, tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(str(n) for n in range(10, 60)))

    for opening in ([1], [7, 1]):
        found = drawn(str(tmp_path / "a.txt"), gqa, Numbers(*opening), samples=4, length=8, seed=0)
        assert found.shape == (4, 8)
        for row in found.tolist():
            assert row[: len(opening)] == opening
            assert row[len(opening) :] == list(range(row[-1] - 7 + len(opening), row[-1] + 1))
    with pytest.raises(DataError, match="a sample of 2 tokens has no room for text after the 2 that the tokenizer"):
        drawn(str(tmp_path / "a.txt"), gqa, Numbers(7, 1), samples=4, length=2, seed=0)


def test_a_mixture_takes_a_sample_of_each_part_in_turn_or_in_the_shares_that_are_given(wide):
    in_turn = drawn("counting, counting:1000, counting:2000", wide, samples=8, length=4, seed=0)
    assert in_turn[:, 0].tolist() == [0, 1000, 2000, 4, 1004, 2004, 8, 1008]
    mixed = drawn("3*counting:0,1*counting:1000", wide, samples=8, length=4, seed=0)
    small = [row[0].item() < 1000 for row in mixed]
    assert small.count(True) == 6 and small[:4].count(True) == 3, "every part of the text has the shares"
    assert sorted(row[0].item() for row in mixed) == [0, 4, 8, 12, 16, 20, 1000, 1004]
    with pytest.raises(DataError, match=r"--samples 3 gives '1\*counting:1000' none by its share; raise --samples"):
        drawn("9*counting,1*counting:1000", wide, samples=3, length=4, seed=0)


TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"


def test_conversations_are_sampled_in_the_models_own_chat_template(wide, tmp_path):
    said = [("What is two and two?", "Two and two make four."), ("Capital of France?", "Paris.")]
    messages = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in said]
    file = tmp_path / "messages.jsonl"
    file.write_text("\n".join(json.dumps({"messages": each}) for each in messages))
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = TEMPLATE
    rendered = {f"<s>user: {q}</s><s>assistant: {a}</s>" for q, a in said}
    job = job_of(f"1*self,3*chat:{file}", samples=4, length=48)
    ids = job.draw(replace(wide, tokenizer=tokenizer), 4, 0)
    assert ids.shape == (4, 48)
    chats = [row for row, part in zip(ids, job.order(), strict=True) if part == 1]
    assert len(chats) == 3
    for row in chats:
        whole = tokenizer.decode(row)
        assert any("".join(joined).startswith(whole) for joined in product(rendered, repeat=4))
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(DataError, match=r"messages\.jsonl, line 1: the chat template of .* refuses it: no"):
        drawn(f"chat:{file}", wide, tokenizer, samples=1, length=8, seed=0)


def test_passages_are_written_with_the_fast_attention_of_one_token(gqa, monkeypatch):
    own, queries = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def counted(module, query, *arguments, **options):
        queries.append(query.shape[2])
        return own(module, query, *arguments, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", counted)
    assert gqa.network.config._attn_implementation == "sdpa"
    written.self_generated(gqa.network, None, 2, 16, 0)
    assert queries == [], "every step has one query"


def test_every_conversation_is_used_before_one_is_used_again(monkeypatch):
    used = []
    monkeypatch.setattr(chat, "texts_at", lambda place, text, *_: [text])
    monkeypatch.setattr(chat, "token_ids", lambda text, _: used.append(text) or text)
    task = SampleTask(None, None, "a.jsonl", samples=5, length=6, seed=0, family=None)
    rows = chat.packed([("", [n] * 3) for n in range(10)], task)
    assert sorted(token for row in rows for token in row) == sorted([*range(10)] * 3)
    assert rows == chat.packed([("", [n] * 3) for n in range(10)], task)
    with pytest.raises(DataError, match=r"'a\.jsonl' is too short for 6 tokens"):
        chat.packed([("", [n] * 2) for n in range(2)], task)
    used.clear()
    chat.packed([("", [n] * 3) for n in range(1000)], task)
    assert len(used) == 10, "others are not tokenised"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("self", [("self", "")]),
        ("counting:7, a.txt", [("counting", "7"), ("text", "a.txt")]),
        ("counting:a:b", [("counting", "a:b")]),
        ("wikitext:name:test", [("text", "wikitext:name:test")]),
        ("text:name", [("text", "text:name")]),
        ("text", [("text", "text")]),
    ],
)
def test_a_part_names_a_source_a_file_or_a_data_set(text, parts):
    assert parts_of(text) == parts


def test_a_file_is_read_even_if_it_has_the_name_of_a_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("counting", "counting:7"):
        (tmp_path / name).write_text("text")
        assert parts_of(f"{name}, self") == [("text", name), ("self", "")]


def test_what_is_wrong_with_a_part_is_found_before_a_model_is_loaded(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": 1}')
    for text, message in {
        f"self,{tmp_path}/a.jsonl": "line 1: expected an object with one of the fields text",
        "missing.txt": "missing.txt: no such file",
        "self:more": "--calibration self:more: the model writes this text",
        "chat:": "name a file or data set with conversations, as chat:FILE",
        f"chat:{tmp_path}/a.jsonl": "expected 'instruction', 'output'",
    }.items():
        with pytest.raises(DataError, match=message):
            job_of(text).check()
    job_of("self,counting").check()


def test_settings_reach_their_source_and_are_recorded(gqa):
    job = job_of("counting:5, counting", {"counting": {"start": "2"}}, samples=2, length=3)
    assert job.record() == {"counting": {"start": 2}} and not job.writes
    assert job.draw(gqa, 2, 0).tolist() == [[7, 8, 9], [2, 3, 4]]
    assert job_of("self,a.txt").writes
    with pytest.raises(SettingsError, match=r"calibration source counting: unknown setting 'end'\. Known: start"):
        parse_calibration("counting", SOURCES, {"counting": {"end": 2}})


def test_a_default_is_two_thirds_for_a_large_model(gqa, monkeypatch):
    monkeypatch.setattr(calibration, "LARGE", gqa.graph.decoder_parameters)
    asked, default = job_of("counting", samples=6), replace(job_of("counting", samples=6), fixed_samples=False)
    assert (asked.samples_for(gqa), default.samples_for(gqa)) == (6, 4)
    assert default.sample(gqa, Execution(gqa.weights), 0).input_ids.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert replace(job_of("counting,counting", samples=2), fixed_samples=False).samples_for(gqa) == 2, "one of each"
    monkeypatch.setattr(calibration, "LARGE", gqa.graph.decoder_parameters + 1)
    assert default.samples_for(gqa) == 6


def test_a_source_that_gives_something_else_is_named(gqa, monkeypatch):
    monkeypatch.setattr(Counting, "sample", lambda self, task: torch.zeros(2, 3))
    with pytest.raises(PluginError, match=r"source counting gave torch.float32 of shape \(2, 3\); expected"):
        drawn("counting", gqa, samples=2, length=4, seed=0)
