"""Trainings in shards by two processes, and trainings that compute activations again, give the result of one."""

import json

import pytest
import tiny_models
import torch
from ranks import run_ranks
from recovery_cases import dense_model, pruned_model, train_tiny, write_lines
from safetensors.torch import load_file

import llmpruner
from llmpruner import SettingsError
from llmpruner.recovery.strategies import DistilStrategy, FullStrategy, LoraStrategy

# More than an epoch, so that one process alone reads the dense model before, too; and no batch of an odd number of
# rows, of which two processes repeat one.
TRAINING = {
    "max_steps": 8, "batch_size": 4, "micro_batch_size": 2, "cutoff": 24, "learning_rate": 1e-3, "limit": 23,
    "validation": 4,
}  # fmt: skip
# Dropout draws other numbers in another process.
OWN = {"lora": {"lora": {"dropout": 0}}, "distil": {"distil": {"trains": "lora"}}}


def home_of(folder, model):
    """``folder`` with a pruned model and data."""
    model.save_pretrained(folder / "dense")
    tiny_models.tokenizer().save_pretrained(folder / "dense")
    llmpruner.prune(str(folder / "dense"), output=folder / "pruned", ratio=0.2, importance="l1", compensate="none")
    write_lines(folder / "data.jsonl")
    return folder


def in_shards(home, **cases):
    """What each of two processes has after the ``cases``: strategy, settings, and the step of an interruption."""
    options = {**TRAINING, "data": str(home / "data.jsonl"), "sharded": True}
    told = {n: (stop, {**options, "strategy": name, "settings": own}) for n, (name, own, stop) in cases.items()}
    done = run_ranks("sharded_training", of_2=(home, json.dumps(told)))
    assert done.returncode == 0, done.stderr
    return {name: [torch.load(home / f"{name}-{rank}.pt") for rank in (0, 1)] for name in cases}


def check_as_alone(home, name, strategy, settings, two):
    """Both processes have the losses of one alone, and its weights but for rounding; the first saved them."""
    options = {**TRAINING, "data": str(home / "data.jsonl"), "strategy": strategy, "settings": settings}
    one = llmpruner.recover(str(home / "pruned"), output=home / f"{name}-alone", **options)
    assert list((home / f"{name}.work").glob("checkpoint-*/shards/*.distcp")), "nothing was sharded"
    expected, record = one.network.state_dict(), one.record["recovery"][-1]
    saved = load_file(home / name / "model.safetensors")
    for each in two:
        assert each["class"] == type(one.network).__name__
        losses = [[row["loss"] for row in rows["validation"]] for rows in (record, each["record"])]
        assert losses[0] == pytest.approx(losses[1], abs=1e-3) and losses[0][-1] < losses[0][0]
        for key, value in expected.items():
            assert each["weights"][key].dtype == value.dtype
            torch.testing.assert_close(each["weights"][key], value, atol=2e-3, rtol=2e-3)
        assert all(torch.equal(each["weights"][key], value) for key, value in saved.items())


@pytest.mark.slow
def test_shards_give_the_result_of_one_process_after_an_interruption_too(tmp_path):
    home = home_of(tmp_path, dense_model())
    cases = in_shards(home, whole=("full", {}, None), parts=("full", {}, 5))
    check_as_alone(home, "whole", "full", {}, cases["whole"])
    for whole, parts in zip(*cases.values(), strict=True):
        assert whole["record"]["losses"] == parts["record"]["losses"]
        for key, value in whole["weights"].items():
            assert torch.equal(parts["weights"][key], value), key


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_strategy_in_shards(tmp_path, dtype):
    home = home_of(tmp_path, dense_model(dtype))
    cases = {"full": ("full", {}, 5), "lora": ("lora", OWN["lora"], 5), "distil": ("distil", {}, None)}
    cases["distil_lora"] = ("distil", OWN["distil"], 5)
    for name, two in in_shards(home, **cases).items():
        check_as_alone(home, name, *cases[name][:2], two)


@pytest.mark.long
def test_tied_weights_stay_tied_in_shards(tmp_path):
    home = home_of(tmp_path, tiny_models.llama(tied=True))
    two = in_shards(home, tied=("full", {}, None))["tied"]
    check_as_alone(home, "tied", "full", {}, two)
    ends = ("lm_head.weight", "model.embed_tokens.weight")
    assert all(torch.equal(*(each["weights"][end] for end in ends)) for each in two)


def test_one_process_has_no_shards(tmp_path):
    home = home_of(tmp_path, tiny_models.llama())
    with pytest.raises(SettingsError, match=r"recover.sharded=true needs several processes"):
        llmpruner.recover(str(home / "pruned"), output=home / "out", sharded=True)


@pytest.mark.parametrize(
    "strategy", [FullStrategy(), LoraStrategy(dropout=0.1), DistilStrategy()], ids=lambda s: s.name
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_that_are_computed_again_change_nothing(tmp_path, strategy, dtype):
    results, calls = [], []
    for recomputes in (False, True):
        model, graph = pruned_model(dtype)
        layer = model.model.layers[0]
        layer.mlp.register_forward_pre_hook(lambda *_, recomputes=recomputes: calls.append(recomputes))
        results.append(train_tiny(tmp_path / str(recomputes), strategy, (model, graph), recomputes=recomputes))
        assert not layer.gradient_checkpointing
    kept, again = results
    backward = calls.count(True) - calls.count(False)
    assert backward >= 2 * len(kept.losses), "two micro-batches a step, some in parts of rows of one length"
    assert again.losses == pytest.approx(kept.losses, abs=1e-6)
    assert again.record["validation"] == kept.record["validation"]
    for name, value in kept.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, atol=1e-6, rtol=0)
