"""The dense model of a pruned one: the base and its adapter together, and of a hub model the commit that was pruned."""

import json

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model

import llmpruner
from llmpruner import LoadSettings, api
from llmpruner.calibration.conversations import Completion
from llmpruner.discovery.opening import Opener, placed_as
from llmpruner.discovery.oracle import logits
from llmpruner.models.opening import load_model, load_pruned
from llmpruner.models.reference import Reference, model_identity

IDS = torch.arange(5, 37).unsqueeze(0)


def adapted(base, folder, seed):
    """An adapter that changes the model, as other programs write it: for ``base``, and without a tokenizer."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(load_pruned(base), config)
    for adapter in model.peft_config.values():
        adapter.base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path):
    tiny_models.llama().save_pretrained(tmp_path / "base")
    tiny_models.tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def one(base, tmp_path):
    return adapted(base, tmp_path / "one", 1)


def test_the_dense_model_has_the_adapter(one, catalog, tmp_path, monkeypatch):
    """For a recovery, and for `verify`, from any folder."""
    monkeypatch.chdir(tmp_path)
    llmpruner.prune("one", ratio=0.2, importance="l1", compensate="none", output="pruned")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    pruned = load_model(Opener(catalog).structure("../pruned"))
    dense = Opener(catalog).dense_structure(pruned)
    assert pruned.record["base_path"] == str(one) == dense.path
    whole = load_model(Opener(catalog).structure(one))
    again = load_model(dense, placed_as(pruned, LoadSettings()))
    assert torch.equal(logits(again.network, IDS), logits(whole.network, IDS))
    assert not torch.allclose(logits(whole.network, IDS), logits(load_pruned(tmp_path / "base"), IDS), atol=1e-2)
    states = {check.name: check.state for check in api.verify_checkpoint("../pruned", catalog=catalog).checks}
    assert set(states.values()) == {"passed"}, states


def test_text_of_the_dense_model_is_written_with_the_adapter(one, catalog, tmp_path, monkeypatch):
    llmpruner.prune(one, ratio=0.2, importance="l1", compensate="none", output=tmp_path / "pruned")
    wrote = []
    monkeypatch.setattr(
        "llmpruner.recovery.dense.write_examples",
        lambda own, dense, *_: wrote.append(logits(dense.network, IDS)) or [Completion("The fox jumps over it. " * 4)],
    )
    training = {"max_steps": 2, "batch_size": 2, "micro_batch_size": 2}
    api.recover(tmp_path / "pruned", data="self-text:1", output=tmp_path / "out", **training)
    assert torch.equal(wrote[0], logits(load_model(Opener(catalog).structure(one)).network, IDS))


def test_a_pruned_model_with_an_adapter_is_pruned_again(base, catalog, tmp_path):
    """The dense model is that of the first cut; the weights are not those of the two cuts, which `verify` knows."""
    llmpruner.prune(base, ratio=0.2, importance="l1", compensate="none", output=tmp_path / "first")
    adapter, out = adapted(tmp_path / "first", tmp_path / "one", 1), tmp_path / "out"
    llmpruner.prune(adapter, ratio=0.2, importance="l1", compensate="none", output=out)
    record = json.loads((out / "llmpruner.json").read_text())
    assert record["base_path"] == str(base) and len(record["plans"]) == 2
    assert record["adapters"] == ["one"]
    checks = {check.name: check for check in api.verify_checkpoint(out, catalog=catalog).checks}
    assert "damaged" not in {check.state for check in checks.values()}, checks
    assert "trained after the cut" in checks["weights"].detail


def test_an_adapter_for_an_adapter_is_refused(one, catalog, tmp_path):
    two = tmp_path / "two"
    two.mkdir()
    (two / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(one)}))
    with pytest.raises(llmpruner.ModelError, match=r"two' is an adapter for an adapter, '.*one'; merge"):
        Opener(catalog).structure(two)


def test_an_adapter_in_the_folder_of_its_model_is_refused(base, catalog):
    adapted(base, base, 1)
    with pytest.raises(llmpruner.ModelError, match=r"is for a model in the same folder; move adapter_config\.json"):
        Opener(catalog).structure(base)


FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
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
    dense = load_model(Opener(catalog).dense_structure(Opener(catalog).structure(tmp_path / "out")))
    expected = (tiny_models.llama(seed=seed).lm_head.weight for seed in range(2))
    assert [torch.equal(dense.network.lm_head.weight, weight) for weight in expected] == [True, False]


def test_another_commit_is_another_model(hub, catalog):
    commits = [api.discover("some/model", revision=revision).reference.commit for revision in (None, SECOND)]
    assert commits == [FIRST, SECOND]
    assert len({model_identity(Reference("some/model", "some/model", commit=commit)) for commit in commits}) == 2
