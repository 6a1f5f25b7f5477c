"""A model with a trimmed vocabulary next to the dense one: compared, trained toward it, verified."""

import pytest
import tiny_models
import torch
from recovery_cases import dense_model, write_lines

import llmpruner
from llmpruner.evaluation.perplexity import perplexity
from llmpruner.models.vocabulary import old_ids
from llmpruner.recovery.base import RecoveryJob
from llmpruner.recovery.losses import distillation_loss
from llmpruner.settings import RecoverSettings

KEPT = "Q Z 7, X; 8 % J & W 9 = K " * 4
"""No two of its characters are merged."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("trimmed")
    dense_model().save_pretrained(home / "dense")
    tiny_models.tokenizer().save_pretrained(home / "dense")
    for name, text in (("text", tiny_models.TEXT), ("kept", KEPT)):
        (home / f"{name}.txt").write_text(text)
    llmpruner.prune(
        home / "dense", output=home / "trimmed", kinds="vocabulary", settings={"vocabulary": {"tokens": 280}},
        calibration=str(home / "text.txt"), samples=4, length=32,
    )  # fmt: skip
    return home


@pytest.fixture(scope="module")
def dense(home):
    return llmpruner.load(home / "dense")


@pytest.fixture(scope="module")
def trimmed(home):
    return llmpruner.load(home / "trimmed")


def ids_of(model, text):
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def logits(model, *rows):
    with torch.no_grad():
        return model(input_ids=torch.tensor(rows), attention_mask=torch.ones(len(rows), len(rows[0]))).logits


def test_the_dense_model_reads_removed_tokens_whole(dense, trimmed):
    kept = list(trimmed.plans[0].kept["vocabulary"])
    assert old_ids(dense.tokenizer, trimmed.tokenizer) == kept and len(kept) < 300
    assert old_ids(trimmed.tokenizer, dense.tokenizer) is None
    network, ids = dense.in_tokens_of(trimmed), ids_of(trimmed, tiny_models.TEXT[:200])
    own, ends = network.read(ids)
    assert own == ids_of(dense, tiny_models.TEXT[:200]) and len(own) < len(ids)
    torch.testing.assert_close(logits(network, ids)[0, ends], logits(dense.network, own)[0][:, kept])
    same = [before in kept for before in own[1:]]
    assert [bool(network.agree(torch.tensor(ids))[end]) for end in ends[:-1]] == same and 0 < sum(same) < len(same)
    assert dense.in_tokens_of(dense) is dense.network


def test_divergence_is_over_kept_tokens(home, dense, trimmed, caplog):
    """An untouched trim differs in what it reads alone."""
    results = {}
    for name in ("kept", "text"):
        text = (home / f"{name}.txt").read_text()
        reference = dense.in_tokens_of(trimmed)
        results[name] = perplexity(trimmed.network, trimmed.tokenizer, text, window=32, reference=reference)
    assert results["kept"].kl_per_token == pytest.approx(0, abs=1e-6) and results["kept"].top1_agreement == 1
    assert results["text"].kl_per_token > 1e-3
    models, options = [home / "dense", home / "trimmed"], {"kl": True, "window": 32}
    _, found = llmpruner.evaluate(models, perplexity=str(home / "text.txt"), **options)
    assert (found.perplexity, found.kl) == (results["text"].perplexity, results["text"].kl_per_token)
    assert [r.getMessage() for r in caplog.records if "bits per byte" in r.getMessage()] == [
        "the tokenizers differ, and perplexity is per token: compare bits per byte"
    ]
    caplog.clear()
    llmpruner.evaluate(models, perplexity=str(home / "kept.txt"), **options)
    assert not caplog.records
    with pytest.raises(llmpruner.ModelError, match="name the dense model before a trimmed one"):
        llmpruner.evaluate(models[::-1], perplexity=str(home / "text.txt"), **options)


def test_the_teacher_says_removed_tokens_by_their_pieces(tmp_path, dense, trimmed):
    ids = ids_of(trimmed, tiny_models.TEXT[:120])
    teacher, (own, ends) = dense.in_tokens_of(trimmed, teaching=True), dense.in_tokens_of(trimmed).read(ids)
    expected = torch.zeros(len(ids), trimmed.network.config.vocab_size)
    kept = list(trimmed.plans[0].kept["vocabulary"])
    firsts = [ids_of(trimmed, dense.tokenizer.decode([token]))[0] if token not in kept else kept.index(token)
              for token in range(300)]  # fmt: skip
    for end, p in zip(ends, logits(dense.network, own)[0].softmax(-1), strict=True):
        for token, first in enumerate(firsts):
            expected[end, first] += p[token]
    for place in set(range(len(ids))) - set(ends):
        expected[place, ids[place + 1]] = 1
    torch.testing.assert_close(logits(teacher, ids)[0].softmax(-1), expected, atol=1e-5, rtol=1e-4)
    job = RecoveryJob(
        trimmed.network, trimmed.tokenizer, [], [], trimmed.graph, RecoverSettings(), tmp_path, lambda: teacher
    )  # fmt: skip
    row = torch.tensor([[5] * 3 + ids])  # padded on the left
    mask = torch.ones_like(row).index_fill_(1, torch.arange(3), 0)
    labels = row.masked_fill(mask == 0, -100).index_fill_(1, torch.tensor([3]), -100)
    loss = distillation_loss(job, 0.0)(trimmed.network, {"input_ids": row, "attention_mask": mask, "labels": labels})
    with torch.no_grad():
        q = trimmed.network(input_ids=row, attention_mask=mask).logits[0, 3:-1].log_softmax(-1)
    p = expected[:-1]
    assert float(loss.detach()) == pytest.approx(float((torch.xlogy(p, p) - p * q).sum(-1).mean()), rel=1e-4)


@pytest.mark.parametrize("strategy", ["distil", "lora"])
def test_it_is_recovered_and_verified(home, tmp_path, strategy):
    checks = llmpruner.verify_checkpoint(home / "trimmed").checks
    assert [check.state for check in checks] == ["passed"] * 4, checks
    data = "self-text:24" if strategy == "distil" else write_lines(tmp_path / "data.jsonl")
    made = llmpruner.recover(
        home / "trimmed", strategy=strategy, data=data, output=tmp_path / "out", max_steps=2, cutoff=24,
        batch_size=4, learning_rate=1e-3,
    )  # fmt: skip
    again = llmpruner.load(tmp_path / "out")
    assert again.tokenizer.get_vocab() == made.tokenizer.get_vocab() and len(again.tokenizer) < 300
    assert llmpruner.generate(tmp_path / "out", "The quick", max_new_tokens=4) is not None
    assert llmpruner.verify_checkpoint(tmp_path / "out").damage == ()
