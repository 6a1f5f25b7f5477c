"""The metrics ``answers``, what a model answers, and ``given-answers``, the loss of answers alone, both in the model's
chat format."""

import json

import pytest
import tiny_models
import torch
from evaluated_models import evaluated, in_memory
from test_chat import CHATML, tokenizer

from llmpruner import DataError, ModelFamily
from llmpruner.discovery.oracle import logits
from llmpruner.errors import SettingsError
from llmpruner.evaluation.evaluate import ComparedModel
from llmpruner.evaluation.metrics import AnswersMetric, GivenAnswersMetric, repeated

RECORDS = (
    {"instruction": "Name two rivers.", "output": "Elbe, Loire."},
    {"messages": [
        {"role": "user", "content": "Two rivers?"},
        {"role": "assistant", "content": "Elbe and the Loire, of course."},
        {"role": "user", "content": "The longer?"},
        {"role": "assistant", "content": "The Elbe."},
    ]},
    {"prompt": "The quick", "completion": " brown fox"},
)  # fmt: skip


@pytest.fixture
def data(tmp_path):
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return str(tmp_path / "answers.jsonl")


def subject(name="tiny", *, template=CHATML, **options):
    return in_memory(name, tokenizer=tokenizer(template), family=ModelFamily(), **options)


def measured(metric, *subjects):
    return evaluated([lambda one=one: one for one in subjects], [metric])


def by_hand(model, pieces):
    """Sum of the losses of answers, their number of tokens, and the log-probabilities before them. ``pieces``: text,
    and whether it is of an answer."""
    ids, answered = [], []
    for text, counts in pieces:
        own = tokenizer()(text, add_special_tokens=False)["input_ids"]
        ids += own
        answered += [counts] * len(own)
    found = logits(model, torch.tensor([ids]))[0].log_softmax(-1)
    counted = [at for at in range(1, len(ids)) if answered[at]]
    return -sum(float(found[at - 1, ids[at]]) for at in counted), len(counted), found[[at - 1 for at in counted]]


INSTRUCTION = (
    ("<s>", False), ("[user] Name two rivers.</s>\n", False), ("[assistant] ", False), ("Elbe, Loire.</s>\n", True)
)  # fmt: skip


def test_the_loss_is_that_of_the_tokens_of_answers(tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps(RECORDS[0]))
    one, other = subject(), subject("other", seed=1)
    first, second = measured(GivenAnswersMetric(data=str(tmp_path / "one.jsonl"), kl=True), one, other)
    for model, found in ((one.network, first), (other.network, second)):
        loss, tokens, _ = by_hand(model, INSTRUCTION)
        assert found.results["given-answers"]["tokens"] == tokens > 3
        assert found.results["given-answers"]["nll_per_token"] == pytest.approx(loss / tokens, rel=1e-5)
    p, q = (by_hand(model, INSTRUCTION)[2] for model in (one.network, other.network))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert first.results["given-answers"]["kl_per_token"] == 0.0
    assert second.results["given-answers"]["kl_per_token"] == pytest.approx(kl, rel=1e-4)
    assert [row.label for row in second.rows] == ["perplexity of answers", "KL to the first, answers"]


def test_every_answer_of_a_conversation_counts_and_examples_are_read_up_to_the_cutoff(data):
    (whole,) = measured(GivenAnswersMetric(data=data), subject())
    (first,) = measured(GivenAnswersMetric(data=data, limit=1), subject())
    (short,) = measured(GivenAnswersMetric(data=data, cutoff=20), subject())
    assert whole.results["given-answers"]["examples"] == 3 and first.results["given-answers"]["examples"] == 1
    assert 0 < short.results["given-answers"]["tokens"] < whole.results["given-answers"]["tokens"]
    # The answers of the conversation, and of the completion.
    more = whole.results["given-answers"]["tokens"] - first.results["given-answers"]["tokens"]
    texts = ("Elbe and the Loire, of course.</s>\n", "The Elbe.</s>\n", " brown fox</s>")
    assert more == pytest.approx(sum(len(tokenizer()(t, add_special_tokens=False)["input_ids"]) for t in texts), abs=3)
    assert whole.results["given-answers"]["kl_per_token"] is None


def test_a_model_without_a_template_reads_the_format_of_its_family(data):
    (plain,) = measured(GivenAnswersMetric(data=data, limit=1), subject(template=None))
    (templated,) = measured(GivenAnswersMetric(data=data, limit=1), subject())
    assert plain.results["given-answers"]["nll_per_token"] != templated.results["given-answers"]["nll_per_token"]


def test_data_that_cannot_be_used_is_refused_before_a_model_is_loaded(tmp_path, data):
    def never():
        raise AssertionError("loaded")

    for metric, error, message in (
        (GivenAnswersMetric(), SettingsError, "--set given-answers.data=FILE"),
        (GivenAnswersMetric(data=str(tmp_path / "no.jsonl")), DataError, "no.jsonl"),
    ):
        with pytest.raises(error, match=message):
            evaluated([never], [metric])
    with pytest.raises(DataError, match="no example has an answer within the first 2 tokens"):
        measured(GivenAnswersMetric(data=data, cutoff=2), subject())


def test_an_example_beyond_a_table_of_positions_is_refused(data):
    gpt2 = ComparedModel("gpt2", tiny_models.gpt2(positions=32).config, tokenizer(), subject)
    with pytest.raises(DataError, match=r"of 2,000 tokens are beyond the 32 positions of 'gpt2'; lower --set"):
        GivenAnswersMetric(data=data, cutoff=2000).check_models([gpt2])


def scripted(monkeypatch, *answers):
    """Lets each model, in turn, answer one of 40 instructions by its text, and the others by "Yes."."""
    texts = iter(answers)

    def answered(model, tokenizer, prompts, tokens, numbers=None):
        assert numbers is None, "the likeliest tokens"
        assert tokenizer.decode(prompts[0]).startswith("<s>[user] Name four animals")
        written = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (next(texts), *["Yes."] * 39)]
        return [ids[:tokens] for ids in written]

    monkeypatch.setattr("llmpruner.calibration.written.answered", answered)


def test_answers_are_compared_with_those_of_the_first_model(monkeypatch):
    sentence = "The quick brown fox jumps over the lazy dog. Paris is the capital of France, and Rome is of Italy."
    ids = tokenizer()(sentence, add_special_tokens=False)["input_ids"]
    half = tokenizer().decode(ids[:8]) + " ###"
    assert len(ids) > 16
    scripted(monkeypatch, sentence, half, "one and two and three and " * 20)
    found = measured(AnswersMetric(tokens=64), *(subject() for _ in range(3)))
    first, second, third = (each.results["answers"] for each in found)
    assert first["texts"][:2] == [sentence, "Yes."]
    assert [each["repeat_themselves"] for each in (first, second, third)] == [0, 0, 1 / 40]
    assert [each["cut_off"] for each in (first, second, third)] == pytest.approx([0, 0, 1 / 40])
    assert first["first_tokens"] == 1
    assert second["first_tokens"] == pytest.approx((39 + 8 / 16) / 40)
    assert [row.label for row in found[0].rows if "answers" in row.label] == [
        "answers that repeat", "answers cut off", "answers starting as the first"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ids", "share"), [((1, 2, 3), 0), (range(9), 0), ((1, 2, 3, 4) * 3, 5 / 9), ((7,) * 8, 4 / 5)]
)
def test_repetition_is_the_share_of_runs_of_four_that_were_there_before(ids, share):
    assert repeated(list(ids)) == pytest.approx(share)
