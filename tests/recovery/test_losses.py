"""Losses in blocks: values and gradients of the same loss over all logits at once; distillation by its formula."""

import pytest
import tiny_models
import torch
from recovery_cases import dense_model, pruned_model, train_tiny
from torch.nn import functional

from llmpruner import ModelError
from llmpruner.recovery import losses
from llmpruner.recovery.base import RecoveryJob
from llmpruner.recovery.losses import by_length, distillation_loss, mean_over_tokens, next_token_loss
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


@pytest.mark.parametrize("side", ["left", "right"])
def test_short_rows_are_not_padded_to_long_ones(side):
    ids, mask = torch.arange(36).view(3, 12), torch.ones(3, 12, dtype=torch.int64)
    for row, length in ((0, 4), (2, 3)):
        mask[row, slice(None, 12 - length) if side == "left" else slice(length, None)] = 0
    long, short = by_length({"input_ids": ids, "attention_mask": mask})
    assert torch.equal(long["input_ids"], ids[1:2]) and short["attention_mask"].shape == (2, 4)
    assert torch.equal(short["input_ids"][0], ids[0][mask[0] == 1])
    assert int(short["attention_mask"].sum()) == 7


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
