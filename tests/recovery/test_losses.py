"""Losses in blocks: values and gradients of the same loss over all logits at once; distillation by its formula, also of
a model with a trimmed vocabulary, which is compared with the dense one, trained toward it, and verified."""

import pytest
import tiny_models
import torch
from recovery_cases import dense_model, pruned_model, train_tiny, write_lines
from torch.nn import functional

import llmpruner
from llmpruner import ModelError
from llmpruner.evaluation.perplexity import perplexity
from llmpruner.models.vocabulary import old_ids
from llmpruner.recovery import losses
from llmpruner.recovery.base import RecoveryJob
from llmpruner.recovery.losses import distillation_loss, mean_over_tokens, next_token_loss
from llmpruner.recovery.strategies import DistilStrategy, FullStrategy
from llmpruner.settings import RecoverSettings
from llmpruner.testing import RecoveryConformance

LABELS = torch.tensor([[-100, 1, -100], [2, 0, 6], [6, -100, 3]])
PLACES, NEXT = torch.tensor([0, 3, 4, 7]), torch.tensor([1, 0, 6, 3])


class TestConformance(RecoveryConformance):
    strategy = DistilStrategy


def term(logits, places, next_tokens):
    assert set(places.tolist()) <= set(PLACES.tolist())
    return functional.cross_entropy(logits, next_tokens, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [7, 14, 1000])
def test_it_is_the_loss_over_all_logits(monkeypatch, dtype, elements):
    monkeypatch.setattr(losses, "_ELEMENTS", elements)
    logits = torch.randn(3, 3, 7).to(dtype)
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = functional.cross_entropy(one.flatten(0, 1)[PLACES].float(), NEXT)
    mean = mean_over_tokens(other, LABELS, term)
    torch.testing.assert_close(mean, expected)
    (3 * expected).backward()
    (3 * mean).backward()
    torch.testing.assert_close(other.grad, one.grad)
    nothing = mean_over_tokens(other, LABELS * 0 - 100, term)
    assert float(nothing.detach()) == 0


def test_it_computes_in_float32_under_autocast():
    seen = []

    def exact(logits, *_):
        seen.append((logits @ logits.T).dtype)
        return logits.sum(-1)

    with torch.autocast("cpu", torch.bfloat16):
        mean_over_tokens(torch.randn(3, 3, 7, dtype=torch.bfloat16), LABELS, exact)
    assert seen == [torch.float32]


@pytest.fixture
def batch():
    ids = torch.tensor([[(7 * n + 3 * t) % 60 + 3 for t in range(12)] for n in range(2)])
    return {"input_ids": ids, "labels": ids.clone().index_fill_(1, torch.arange(3), -100), "attention_mask": ids // ids}


def job_of(tmp_path, teacher):
    model, graph = pruned_model()
    return RecoveryJob(model, tiny_models.tokenizer(), [], [], graph, RecoverSettings(), tmp_path, lambda: teacher)


def test_the_distillation_loss_is_the_formula(tmp_path, batch):
    dense = dense_model()
    job = job_of(tmp_path, dense)
    trained = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        p, q = (m(batch["input_ids"]).logits[:, :-1][trained] for m in (dense, job.model))
        value = distillation_loss(job, 0.25)(job.model, batch)
    divergence = functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="batchmean", log_target=True)
    next_token = functional.cross_entropy(q, batch["labels"][:, 1:][trained])
    assert float(value) == pytest.approx(float(0.75 * divergence + 0.25 * next_token), rel=1e-5)
    assert float(next_token_loss(job.model, batch).detach()) == pytest.approx(float(next_token), rel=1e-5)


def test_models_with_other_tokens_are_refused(tmp_path):
    dense = dense_model()
    dense.resize_token_embeddings(dense.config.vocab_size + 8)
    with pytest.raises(ModelError, match=r"predicts \d+ tokens and the reference \d+"):
        distillation_loss(job_of(tmp_path, dense), 0.0)


def test_the_teacher_is_loaded_once_and_only_on_request(tmp_path):
    loads = []

    def load():
        loads.append(1)
        return dense_model()

    train_tiny(tmp_path / "full", FullStrategy(), max_steps=1, load_teacher=load)
    assert loads == []
    train_tiny(tmp_path / "distil", DistilStrategy(), max_steps=3, load_teacher=load)
    assert loads == [1]


# A trimmed vocabulary


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
    teacher, (own, ends) = dense.teacher_of(trimmed, trimmed.tokenizer), dense.in_tokens_of(trimmed).read(ids)
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
