"""All of a hub model is read from one commit, which the plan names: the dense model stays the one that was pruned."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch

from llmpruner import api
from llmpruner.discovery.opening import dense_structure, load_structure
from llmpruner.models.opening import load_model
from llmpruner.models.reference import model_identity

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The cache of a hub model with two commits, of which the branch is the first."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--some--model"
    for seed, commit in enumerate((FIRST, SECOND)):
        tiny_models.llama(seed=seed).save_pretrained(repository / "snapshots" / commit)
        tiny_models.tokenizer().save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(FIRST)
    return repository


def test_the_dense_model_is_the_commit_that_was_pruned(hub, catalog, tmp_path):
    pruned = api.prune("some/model", ratio=0.2, importance="l1", compensate="none", output=tmp_path / "out")
    assert pruned.plans[-1].base.revision == FIRST
    (hub / "refs" / "main").write_text(SECOND)
    dense = load_model(dense_structure(load_structure(str(tmp_path / "out"), catalog), catalog))
    expected = (tiny_models.llama(seed=seed).lm_head.weight for seed in range(2))
    assert [torch.equal(dense.model.lm_head.weight, weight) for weight in expected] == [True, False]


def test_another_commit_is_another_model(hub, catalog):
    commits = [api.discover("some/model", revision=revision).revision for revision in (None, SECOND)]
    assert commits == [FIRST, SECOND]
    assert len({model_identity("some/model", catalog, commit) for commit in commits}) == 2
