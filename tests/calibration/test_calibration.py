"""Calibration text: written by the model, read from files or given by a plugin; reproducible, never silently short."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from itertools import pairwise, product

import pytest
import tiny_models
import torch
from transformers import GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmpruner import DataError, ModelError, UnsupportedModelError
from llmpruner.calibration import written
from llmpruner.calibration.calibration import parse_calibration
from llmpruner.calibration.chat import packed
from llmpruner.calibration.sources import CalibrationSource, ChatSource, SelfWritten, TextSource
from llmpruner.calibration.written import _Draw
from llmpruner.calibration.written import _text_before as _text
from llmpruner.component import ComponentSettings
from llmpruner.discovery.family import ModelFamily
from llmpruner.errors import PluginError, SettingsError
from llmpruner.structure.plan import CompensationRecord


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
    model = copy.deepcopy(gqa.model)
    model.resize_token_embeddings(6000, mean_resizing=False)
    return replace(gqa, model=model)


SOURCES = {cls.name: cls for cls in (SelfWritten, TextSource, ChatSource, Counting)}


def calibration_set(text, model, tokenizer, settings=None, **amount):
    return parse_calibration(text, SOURCES, settings).sample(model, tokenizer, **amount)


def parts_of(text):
    return [(part.source.name, part.reference) for part in parse_calibration(text, SOURCES).parts]


class Words:
    """A tokenizer of one token per character, enough to count."""

    def __call__(self, text, add_special_tokens, verbose):
        return {"input_ids": [ord(c) % 128 for c in text]}


def test_the_model_writes_its_own_text(gqa):
    before = torch.random.get_rng_state()
    one, same, other = (calibration_set("self", gqa.model, None, samples=3, length=20, seed=s) for s in (1, 1, 2))
    assert one.input_ids.shape == (3, 20)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len({tuple(row) for row in one.input_ids.tolist()}) == 3


@pytest.mark.parametrize(("length", "starts"), [(2, [0]), (64, [0]), (65, [0, 33]), (128, [0, 64])])
def test_written_samples_are_made_of_passages(gqa, length, starts):
    passages = {"self": {"starts": "bos"}}
    ids = calibration_set("self", gqa.model, None, passages, samples=12, length=length, seed=0).input_ids
    assert ids.shape == (12, length)
    bos = gqa.model.config.bos_token_id
    begins = (ids == bos).all(0).nonzero().flatten().tolist()
    assert begins == starts
    assert len({tuple(row[start : start + 8]) for row in ids.tolist() for start in starts}) > 6 * len(starts)


def test_passages_are_as_long_as_the_setting_says_and_their_number_at_once_changes_nothing(gqa):
    amount = {"samples": 5, "length": 24, "seed": 3}
    bos = gqa.model.config.bos_token_id

    def written(**settings):
        return parse_calibration("self", SOURCES, {"self": settings}).sample(gqa.model, None, **amount).input_ids

    assert (written(passage=8, starts="bos") == bos).all(0).nonzero().flatten().tolist() == [0, 8, 16]
    assert torch.equal(written(passage=8, batch=2), written(passage=8))
    assert torch.equal(written(passage=64, batch=128), written())


def test_written_samples_begin_as_text_in_use_does(gqa):
    """With what the tokenizer puts before a text. Where that is nothing, every second one with BOS."""

    class Opened:
        def __init__(self, *opening):
            self.opening = list(opening)

        def __call__(self, text, add_special_tokens, verbose):
            return {"input_ids": self.opening * add_special_tokens + [ord(c) for c in text]}

    def written(tokenizer, **settings):
        source = parse_calibration("self", SOURCES, {"self": {"passage": 8, **settings}})
        return source.sample(gqa.model, tokenizer, samples=6, length=24, seed=3).input_ids

    bos = gqa.model.config.bos_token_id
    always, opened, plain = written(None, starts="bos"), written(Opened(7, 9)), written(Opened())
    assert (always[:, 0] == bos).all() and opened.shape == plain.shape == (6, 24)
    assert (opened[:, :2] == torch.tensor([7, 9])).all() and torch.equal(opened[:, 2:], always[:, :-2])
    assert torch.equal(written(Opened(bos)), always)
    assert torch.equal(plain[::2], always[::2])
    assert torch.equal(plain[1::2, :20], always[1::2, 4:]), "from the middle of the first passage"
    assert torch.equal(plain[1::2, 20:], always[1::2, :4]), "which begins at the end"
    assert torch.equal(written(None), plain)


def test_a_class_that_cannot_generate_is_refused_in_one_line(gqa, monkeypatch):
    """As Blenderbot's decoder, which looks for another cache than it is given."""

    def generate(*_, **__):
        raise IndexError("list index out of range")

    monkeypatch.setattr(gqa.model, "generate", generate)
    said = r"LlamaForCausalLM cannot generate text \(IndexError: list index out of range\); give a text with --calib"
    with pytest.raises(UnsupportedModelError, match=said):
        written.self_generated(gqa.model, None, 2, 8, 0)


def test_settings_that_the_model_generates_with_do_not_change_the_text(gqa):
    """As those of Qwen2.5-Instruct (a repetition penalty) and BART (a forced end of the sequence) would."""
    own, model = gqa.model.generation_config, gqa.model
    plain = calibration_set("self", model, None, samples=3, length=20, seed=1).input_ids
    model.generation_config = GenerationConfig(
        repetition_penalty=3.0, forced_eos_token_id=own.eos_token_id, bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
    )  # fmt: skip
    try:
        assert torch.equal(calibration_set("self", model, None, samples=3, length=20, seed=1).input_ids, plain)
        assert model.generation_config.repetition_penalty == 3.0
    finally:
        model.generation_config = own


def test_tokens_are_drawn_as_the_model_predicts_them():
    """Shares of 20,000 draws within four standard errors; tokens of probability 0 are never drawn."""
    logits = torch.tensor([-torch.inf, 1.0, -torch.inf, 0.0, 2.0, -torch.inf])
    draw = _Draw(torch.rand(20000, 2, generator=torch.Generator().manual_seed(0)))
    chosen = draw(torch.zeros(20000, 2), logits.expand(20000, 6)).argmax(-1)
    shares = torch.bincount(chosen, minlength=6) / 20000
    wanted = logits.softmax(-1)
    assert ((shares - wanted).abs() <= 4 * (wanted * (1 - wanted) / 20000).sqrt()).all()


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (1.0, 4)], ids=["lowest", "rounded up"])
def test_the_ends_of_the_range_draw_tokens_with_a_probability(number, token):
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.0, 2.0, -torch.inf]])
    assert _Draw(torch.tensor([[number]]))(torch.zeros(1, 1), logits).argmax(-1).tolist() == [token]


def test_the_end_is_not_drawn():
    """However likely it is, and whatever else the vocabulary does not hold."""
    numbers = torch.linspace(0, 1, 2000)[:, None]
    draw, logits = _Draw(numbers, never=[2, 99]), torch.tensor([0.0, 0.0, 50.0]).expand(2000, 3)
    assert set(draw(torch.zeros(2000, 1), logits).argmax(-1).tolist()) == {0, 1}


def test_passages_begin_as_often_with_a_token_as_the_model_predicts(gqa):
    """Within a passage for each stretch of the scrambled points, where independent draws spread by their root."""
    from_bos = {"self": {"starts": "bos"}}
    ids = calibration_set("self", gqa.model, None, from_bos, samples=128, length=8, seed=0).input_ids
    with torch.no_grad():
        logits = gqa.model(ids[:1, :1]).logits[0, 0]
    eos = gqa.model.generation_config.eos_token_id
    assert not bool((ids == eos).any())
    logits[eos] = -torch.inf
    wanted = 128 * logits.softmax(-1)
    counts = torch.bincount(ids[:, 1], minlength=len(wanted))
    assert float((counts - wanted).abs().max()) <= 2


def test_a_model_without_numbers_writes_no_text(gqa):
    damaged = copy.deepcopy(gqa.model)
    damaged.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ModelError, match="logits are not numbers, so it cannot write text"):
        calibration_set("self", damaged, None, samples=1, length=4, seed=0)


def test_files_are_sampled_reproducibly(gqa, tmp_path):
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog " * 50)
    rows = [{"text": "alpha beta gamma " * 20}, {"page": "delta epsilon " * 20}, {"text": "  "}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    for name in ("a.txt", "a.jsonl"):
        sets = [
            calibration_set(str(tmp_path / name), gqa.model, Words(), samples=4, length=16, seed=s) for s in (0, 0, 1)
        ]
        assert sets[0].input_ids.shape == (4, 16)
        assert sets[0].fingerprint == sets[1].fingerprint != sets[2].fingerprint


class Numbers:
    """A tokenizer of one token per word, which must be a number."""

    def __call__(self, text, add_special_tokens, verbose):
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.mark.parametrize("documents", [1, 40])
def test_windows_do_not_overlap_while_there_is_text(wide, tmp_path, documents):
    size = 4800 // documents
    rows = [" ".join(f"{n:04}" for n in range(d * size, (d + 1) * size)) for d in range(documents)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))

    def windows(samples):
        found = calibration_set(str(tmp_path / "a.jsonl"), wide.model, Numbers(), samples=samples, length=16, seed=0)
        breaks = sum(b != a + 1 for row in found.input_ids.tolist() for a, b in pairwise(row))
        assert breaks == 0 if documents == 1 else breaks < samples
        return found.input_ids.flatten().tolist()

    few, most, more = windows(10), windows(240), windows(500)
    assert len(set(few)) == 160 and max(few) - min(few) > 2400
    assert len(set(most)) == len(most) == 240 * 16
    assert len(more) == 500 * 16 > len(set(more)) > 240 * 16


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("empty.txt", "  \n", "holds no text"),
        ("bad.jsonl", '{"text": "a"}\nnot json', "line 2: not valid JSON"),
        ("field.jsonl", '{"body": "a"}', "line 1: expected an object with one of the fields text, page"),
        ("list.json", '"a"', "expected a JSON list of records"),
        ("short.txt", "too short", "too short for 4 samples of 16 tokens"),
        ("bytes.txt", b"\xff\xfe\x00", "not UTF-8 text"),
    ],
)
def test_bad_data_is_one_clear_line(gqa, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        calibration_set(str(tmp_path / name), gqa.model, Words(), samples=4, length=16, seed=0)
    assert "\n" not in str(caught.value)


class Opened(Numbers):
    """`Numbers` that puts tokens before a text."""

    def __init__(self, *opening):
        self.opening = list(opening)

    def __call__(self, text, add_special_tokens, verbose):
        return {"input_ids": (self.opening if add_special_tokens else []) + super().__call__(text, 0, 0)["input_ids"]}


def test_windows_of_text_begin_with_what_the_tokenizer_puts_before_it(gqa, tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(str(n) for n in range(10, 60)))

    def sampled(tokenizer, length=8, **settings):
        amount = {"samples": 4, "length": length, "seed": 0}
        return calibration_set(str(tmp_path / "a.txt"), gqa.model, tokenizer, {"text": settings}, **amount).input_ids

    for opening in ([1], [7, 1]):
        found = sampled(Opened(*opening))
        assert found.shape == (4, 8)
        for row in found.tolist():
            assert row[: len(opening)] == opening
            assert row[len(opening) :] == list(range(row[-1] - 7 + len(opening), row[-1] + 1))
    plain = sampled(Numbers())
    assert torch.equal(sampled(Opened()), plain) and torch.equal(sampled(Opened(1), bos=False), plain)
    with pytest.raises(
        DataError, match="a sample of 2 tokens has no room for text after the 2 that the tokenizer puts"
    ):
        sampled(Opened(7, 1), length=2)


def test_plans_of_earlier_versions_are_replayed_without_bos():
    """They do not say whether their text had it, and it had not."""
    old = CompensationRecord(name="refit", calibration="a.txt", samples=1, length=4)
    new = old.model_copy(update={"sources": parse_calibration("a.txt", SOURCES).record()})
    for plan, bos in ((old, False), (new, True)):
        (part,) = parse_calibration("a.txt", SOURCES, plan.source_settings).parts
        assert part.source.settings.bos is bos


def test_plans_of_earlier_versions_write_text_as_they_did():
    """Their settings do not say what samples begin with: it was BOS."""
    old = CompensationRecord(name="refit", calibration="self", samples=1, length=4, sources={"self": {"passage": 8}})
    new = old.model_copy(update={"sources": parse_calibration("self", SOURCES).record()})
    for plan, starts in ((old, "bos"), (new, "texts")):
        (part,) = parse_calibration("self", SOURCES, plan.source_settings).parts
        assert part.source.settings.starts == starts
    assert old.source_settings["self"]["passage"] == 8


def test_a_mixture_takes_samples_in_the_shares_that_are_given(wide):
    mixed = calibration_set("3*counting:0,1*counting:1000", wide.model, None, samples=8, length=4, seed=0)
    small = [row[0].item() < 1000 for row in mixed.input_ids]
    assert small.count(True) == 6 and small[:4].count(True) == 3, "every part of the text has the shares"
    assert sorted(row[0].item() for row in mixed.input_ids) == [0, 4, 8, 12, 16, 20, 1000, 1004]
    with pytest.raises(DataError, match=r"--samples 3 gives '1\*counting:1000' none by its share; raise --samples"):
        calibration_set("9*counting,1*counting:1000", wide.model, None, samples=3, length=4, seed=0)


TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"


def test_conversations_are_sampled_in_the_models_own_chat_template(wide, tmp_path):
    said = [("What is two and two?", "Two and two make four."), ("Capital of France?", "Paris.")]
    messages = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in said]
    file = tmp_path / "messages.jsonl"
    file.write_text("\n".join(json.dumps({"messages": each}) for each in messages))
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = TEMPLATE
    rendered = {f"<s>user: {q}</s><s>assistant: {a}</s>" for q, a in said}
    text = parse_calibration(f"1*self,3*chat:{file}", SOURCES)
    text.check()
    ids = text.sample(wide.model, tokenizer, samples=4, length=48, seed=0, family=wide.family).input_ids
    assert ids.shape == (4, 48)
    chats = [row for row, part in zip(ids, text.order(4), strict=True) if part == 1]
    assert len(chats) == 3
    for row in chats:
        whole = tokenizer.decode(row)
        assert any("".join(joined).startswith(whole) for joined in product(rendered, repeat=4))


GENERATES = TEMPLATE + "{% if add_generation_prompt %}<s>assistant: {% endif %}"


@pytest.fixture
def chatty(gqa):
    """A model, and a tokenizer of its vocabulary with a chat template."""
    tokenizer, model = tiny_models.tokenizer(), copy.deepcopy(gqa.model)
    tokenizer.chat_template = GENERATES
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return replace(gqa, model=model), tokenizer


def sampled(loaded, tokenizer, samples=16, length=128, family=None, chats=0.125, **settings):
    text = parse_calibration("self", SOURCES, {"self": {"chats": chats, **settings}})
    amount = {"samples": samples, "length": length, "seed": 0}
    return text.sample(loaded.model, tokenizer, **amount, family=family or loaded.family).input_ids


def test_a_share_of_the_samples_is_conversations_that_the_model_writes(chatty):
    loaded, tokenizer = chatty
    found, texts = sampled(loaded, tokenizer), sampled(loaded, tokenizer, chats=0)
    is_chat = [tokenizer.decode(row).startswith("<s>user: ") for row in found]
    assert [number for number, chat in enumerate(is_chat) if chat] == [7, 15]
    assert torch.equal(found[~torch.tensor(is_chat)], texts[:14]), "the others are as without conversations"
    assert len({tuple(row.tolist()) for row in found[is_chat]}) == 2
    chats = [tokenizer.decode(row) for row in sampled(loaded, tokenizer, samples=32, chats=1)]
    assert all(row.startswith("<s>user: ") for row in chats) and any("</s><s>assistant: " in row for row in chats)
    assert torch.equal(found, sampled(loaded, tokenizer))
    assert torch.equal(found, sampled(loaded, tokenizer, batch=3)), "not of how many are written at once"


@pytest.mark.parametrize(
    ("why", "error", "message"),
    [
        ("no template", ModelError, "has no chat format, or one that changes messages, so it cannot write conv"),
        ("another form", ModelError, "changes messages, so it cannot write conversations; leave self.chats out"),
        ("an encoder", ModelError, "has no chat format, or one that changes messages, so it cannot write conv"),
        ("no tokenizer", ModelError, "brings no tokenizer, so it cannot write conversations"),
        (
            "short samples",
            DataError,
            r"need samples of more than \d+ tokens, as \d+ are of the chat format; raise --set prune.len",
        ),
        ("few samples", DataError, "self.chats: 0.125 of 3 samples is none; raise it, or --samples"),
    ],
)
def test_conversations_that_cannot_be_written_are_refused(chatty, why, error, message, monkeypatch):
    loaded, tokenizer = chatty
    amount = {"short samples": {"length": 16}, "few samples": {"samples": 3}}.get(why, {})
    if why == "no tokenizer":
        tokenizer = None
    elif why == "an encoder":
        loaded.model.config.is_encoder_decoder = True
    elif why in ("no template", "another form"):
        tokenizer.chat_template = {"no template": None, "another form": "{{ messages[0].content | upper }}"}[why]
    # Before passages are written, which takes longer.
    monkeypatch.setattr(written, "self_generated", None)
    with pytest.raises(error, match=message):
        sampled(loaded, tokenizer, **amount)


def test_conversations_need_samples_of_more_than_twice_their_format(chatty):
    with pytest.raises(DataError) as refused:
        sampled(*chatty, samples=1, chats=1, length=16)
    (most,) = (int(number) for number in re.findall(r"more than (\d+) tokens", str(refused.value)))
    with pytest.raises(DataError, match="need samples of more than"):
        sampled(*chatty, samples=1, chats=1, length=most)
    assert sampled(*chatty, samples=1, chats=1, length=most + 1).shape == (1, most + 1)


def test_an_answer_is_drawn_with_other_numbers_than_its_question(chatty, monkeypatch):
    drawn, own = [], written.answered
    monkeypatch.setattr(written, "answered", lambda *args: drawn.append(args[3]) or own(*args))
    sampled(*chatty, samples=1, chats=1)
    questions, answers = drawn
    assert questions.shape[1] == written.QUESTION_TOKENS and answers.shape[1] == written.ANSWER_TOKENS
    assert not torch.isin(questions, answers).any()


@pytest.mark.parametrize("batch", [64, 2])
def test_more_conversations_are_written_where_they_are_too_short_for_a_sample(chatty, monkeypatch, batch):
    own = written.answered
    monkeypatch.setattr(written, "answered", lambda *args: own(*args[:3], args[3][:, :2]))
    found = sampled(*chatty, samples=1, chats=1, batch=batch)
    assert found.shape == (1, 128) and torch.equal(found, sampled(*chatty, samples=1, chats=1))
    text = chatty[1].decode(found[0])
    assert text.count("user: ") > 4


def test_passages_are_written_with_the_fast_attention_of_one_token(gqa, monkeypatch):
    own, queries = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def counted(module, query, *arguments, **options):
        queries.append(query.shape[2])
        return own(module, query, *arguments, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", counted)
    assert gqa.model.config._attn_implementation == "sdpa"
    written.self_generated(gqa.model, None, 2, 16, 0)
    assert queries == [], "every step has one query"


def test_a_question_ends_where_the_model_writes_what_follows_it():
    tokenizer = tiny_models.tokenizer()
    ids = tokenizer("Two rivers? ASSISTANT: Elbe.", add_special_tokens=False)["input_ids"]
    assert _text(tokenizer, ids, "ASSISTANT:") == "Two rivers?"
    assert _text(tokenizer, ids, None) == "Two rivers? ASSISTANT: Elbe."


def test_a_format_of_a_family_is_written_too(chatty):
    loaded, tokenizer = chatty
    tokenizer.chat_template = None

    class Named(ModelFamily):
        def format_prompt(self, instruction, input=""):
            return f"USER: {instruction} ASSISTANT:"

    row = sampled(loaded, tokenizer, samples=1, chats=1, family=Named())[0]
    text = tokenizer.decode(row)
    assert text.startswith(("USER: ", "<s>USER: ", "<s> USER: ")) and text.count("ASSISTANT:") >= 1


def test_an_answer_ends_at_the_text_at_which_its_family_stops(chatty, monkeypatch):
    loaded, tokenizer = chatty
    tokenizer.chat_template = None

    class Stopping(ModelFamily):
        has_own_format = True
        stop_text = "###"

        def format_prompt(self, instruction, input=""):
            return f"USER: {instruction} ASSISTANT:"

    said = tokenizer("Elbe and Loire.### Paris", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(written, "answered", lambda model, tokenizer, prompts, numbers: [said] * len(prompts))
    text = tokenizer.decode(sampled(loaded, tokenizer, samples=1, chats=1, family=Stopping())[0])
    (answer, *_) = text.split("ASSISTANT:")[1].split("</s>")
    assert answer.strip() == "Elbe and Loire."


def test_every_conversation_is_used_before_one_is_used_again():
    rows = packed([[n] * 3 for n in range(10)], samples=5, length=6, seed=0, source="a.jsonl")
    assert sorted(token for row in rows for token in row) == sorted([*range(10)] * 3)
    assert rows == packed([[n] * 3 for n in range(10)], samples=5, length=6, seed=0, source="a.jsonl")
    with pytest.raises(DataError, match="is too short for a sample of 6 tokens"):
        packed([[1, 2], [3]], samples=1, length=6, seed=0, source="a.jsonl")


@pytest.mark.parametrize(
    ("reference", "message"),
    [("", "name a file or data set with conversations, as chat:FILE"), ("a.jsonl", "expected 'instruction', 'output'")],
)
def test_a_source_of_conversations_without_any_is_refused_before_a_model_is_loaded(tmp_path, reference, message):
    (tmp_path / "a.jsonl").write_text('{"body": "no conversation"}')
    with pytest.raises(DataError, match=message):
        parse_calibration(f"chat:{reference and tmp_path / reference}", SOURCES).check()


def test_a_mixture_takes_one_sample_of_each_in_turn(wide, tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        first = 0 if name[0] == "a" else 5000
        text = " ".join(str(n) for n in range(first, first + 800))
        (tmp_path / name).write_text(json.dumps({"text": text}))
    parts = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}, self"
    mixed = calibration_set(parts, wide.model, Numbers(), samples=8, length=16, seed=0)
    assert mixed.input_ids.shape == (8, 16) and mixed.source == parts
    alone = [
        calibration_set(part.strip(), wide.model, Numbers(), samples=3, length=16, seed=0).input_ids
        for part in parts.split(",")
    ]
    for number, row in enumerate(mixed.input_ids):
        assert torch.equal(row, alone[number % 3][number // 3])
    comma = tmp_path / "a,b.jsonl"
    comma.write_text((tmp_path / "a.jsonl").read_text())
    assert parts_of(str(comma)) == [("text", str(comma))]
    with pytest.raises(DataError, match="names an empty source"):
        parse_calibration("self,", SOURCES)
    with pytest.raises(DataError, match="2 samples cannot be shared by 3 sources"):
        calibration_set(parts, wide.model, Numbers(), samples=2, length=16, seed=0)


def test_impossible_requests(gqa):
    with pytest.raises(DataError, match="beyond the model's 128 positions"):
        calibration_set("self", gqa.model, None, samples=1, length=129, seed=0)
    with pytest.raises(DataError, match="at least 1 sample of 2 tokens, got 0 × 8"):
        calibration_set("self", gqa.model, None, samples=0, length=8, seed=0)
    with pytest.raises(ModelError, match=r"no tokenizer, so it cannot be calibrated on 'somewhere.txt'; use 'self'"):
        calibration_set("somewhere.txt", gqa.model, None, samples=1, length=8, seed=0)


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
        "x" * 5000: "no such file|File name too long",
        "self:more": "--calibration self:more: the model writes this text",
    }.items():
        with pytest.raises(DataError, match=message):
            parse_calibration(text, SOURCES).check()
    parse_calibration("self,counting", SOURCES).check()


def test_settings_reach_their_source_and_are_recorded(gqa):
    text = parse_calibration("counting:5, counting", SOURCES, {"counting": {"start": "2"}})
    assert text.record() == {"counting": {"start": 2}} and not text.writes
    assert text.sample(gqa.model, None, samples=2, length=3, seed=0).input_ids.tolist() == [[7, 8, 9], [2, 3, 4]]
    assert parse_calibration("self,a.txt", SOURCES).writes
    with pytest.raises(SettingsError, match=r"calibration source counting: unknown setting 'end'\. Known: start"):
        parse_calibration("counting", SOURCES, {"counting": {"end": 2}})


def test_a_source_that_gives_something_else_is_named(gqa, monkeypatch):
    monkeypatch.setattr(Counting, "sample", lambda self, task: torch.zeros(2, 3))
    with pytest.raises(
        PluginError, match=r"calibration source counting gave torch.float32 of shape \(2, 3\); expected"
    ):
        calibration_set("counting", gqa.model, None, samples=2, length=4, seed=0)
