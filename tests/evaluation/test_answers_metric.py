"""The metric ``answers``: the loss of answers alone, in the model's chat format."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch
from evaluated_models import evaluated, in_memory
from test_chat import CHATML, tokenizer

from llmpruner import DataError, ModelError, ModelFamily
from llmpruner.errors import SettingsError
from llmpruner.evaluation.answers import AnswersMetric
from llmpruner.evaluation.base import ComparedModel

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
    with torch.no_grad():
        found = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    counted = [at for at in range(1, len(ids)) if answered[at]]
    return -sum(float(found[at - 1, ids[at]]) for at in counted), len(counted), found[[at - 1 for at in counted]]


INSTRUCTION = (
    ("<s>", False), ("[user] Name two rivers.</s>\n", False), ("[assistant] ", False), ("Elbe, Loire.</s>\n", True)
)  # fmt: skip


def test_the_loss_is_that_of_the_tokens_of_answers(tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps(RECORDS[0]))
    one, other = subject(), subject("other", seed=1)
    first, second = measured(AnswersMetric(data=str(tmp_path / "one.jsonl"), kl=True), one, other)
    for model, found in ((one.model, first), (other.model, second)):
        loss, tokens, _ = by_hand(model, INSTRUCTION)
        assert found.results["answers"]["tokens"] == tokens > 3
        assert found.results["answers"]["nll_per_token"] == pytest.approx(loss / tokens, rel=1e-5)
    p, q = (by_hand(model, INSTRUCTION)[2] for model in (one.model, other.model))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert first.results["answers"]["kl_per_token"] == 0.0
    assert second.results["answers"]["kl_per_token"] == pytest.approx(kl, rel=1e-4)
    assert [row.label for row in second.rows] == ["perplexity of answers", "KL to the first, answers"]


def test_every_answer_of_a_conversation_counts_and_examples_are_read_up_to_the_cutoff(data):
    (whole,) = measured(AnswersMetric(data=data), subject())
    (first,) = measured(AnswersMetric(data=data, limit=1), subject())
    (short,) = measured(AnswersMetric(data=data, cutoff=20), subject())
    assert whole.results["answers"]["examples"] == 3 and first.results["answers"]["examples"] == 1
    assert 0 < short.results["answers"]["tokens"] < whole.results["answers"]["tokens"]
    # The answers of the conversation, and of the completion.
    more = whole.results["answers"]["tokens"] - first.results["answers"]["tokens"]
    texts = ("Elbe and the Loire, of course.</s>\n", "The Elbe.</s>\n", " brown fox</s>")
    assert more == pytest.approx(sum(len(tokenizer()(t, add_special_tokens=False)["input_ids"]) for t in texts), abs=3)
    assert whole.results["answers"]["kl_per_token"] is None


def test_a_model_without_a_template_reads_the_format_of_its_family(data):
    (plain,) = measured(AnswersMetric(data=data, limit=1), subject(template=None))
    (templated,) = measured(AnswersMetric(data=data, limit=1), subject())
    assert plain.results["answers"]["nll_per_token"] != templated.results["answers"]["nll_per_token"]


def test_data_that_cannot_be_used_is_refused_before_a_model_is_loaded(tmp_path, data):
    def never():
        raise AssertionError("loaded")

    for metric, error, message in (
        (AnswersMetric(), SettingsError, "--set answers.data=FILE"),
        (AnswersMetric(data=str(tmp_path / "no.jsonl")), DataError, "no.jsonl"),
    ):
        with pytest.raises(error, match=message):
            evaluated([never], [metric])
    with pytest.raises(DataError, match="no example has an answer within the first 2 tokens"):
        measured(AnswersMetric(data=data, cutoff=2), subject())


def test_models_that_cannot_be_measured_are_named(data):
    bare = in_memory("bare", tokenizer=False)
    with pytest.raises(ModelError, match="model 'model 0' brings no tokenizer"):
        measured(AnswersMetric(data=data), bare)
    other = subject("other")
    other.model.resize_token_embeddings(other.model.config.vocab_size + 8)
    with pytest.raises(ModelError, match="one vocabulary"):
        measured(AnswersMetric(data=data, kl=True), subject(), other)


def test_an_example_beyond_a_table_of_positions_is_refused(data):
    gpt2 = ComparedModel("gpt2", tiny_models.gpt2(positions=32).config, tokenizer(), ModelFamily())
    with pytest.raises(DataError, match=r"of 2,000 tokens are beyond the 32 positions of 'gpt2'; lower --set"):
        AnswersMetric(data=data, cutoff=2000).check_models([gpt2])
