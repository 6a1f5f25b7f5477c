"""Weights of 16 bits are trained in float32, and rounded once at the end."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from llmpruner_llama.family import LlamaFamily
from torch import nn

from llmpruner import SettingsError
from llmpruner.calibration.chat import TrainingText, Turn
from llmpruner.discovery.groups import build_graph
from llmpruner.recovery.base import RecoveryJob, RecoveryStrategy, TrainingResult
from llmpruner.recovery.distil import DistilStrategy
from llmpruner.recovery.examples import Examples
from llmpruner.recovery.float32 import in_float32
from llmpruner.recovery.full import FullStrategy
from llmpruner.recovery.lora import LoraStrategy
from llmpruner.recovery.run import recover
from llmpruner.recovery.training import fit, latest_checkpoint
from llmpruner.recovery.training_data import prepare
from llmpruner.settings import RecoverSettings

FAMILY = LlamaFamily()
EXAMPLES = Examples(
    tuple(TrainingText((Turn(f"Question {n}:\n", "It is so. " * (n % 4 + 1)),)) for n in range(16)), "here"
)
SETTINGS = RecoverSettings(
    data="here", batch_size=4, micro_batch_size=2, max_steps=40, learning_rate=1e-4, warmup_steps=0, cutoff=48,
    schedule="constant", validation=4, eval_steps=20,
)  # fmt: skip


def model(dtype=torch.bfloat16):
    """All have weights that bfloat16 holds."""
    return tiny_models.llama().bfloat16().to(dtype)


def run(folder, strategy, made=None, settings=SETTINGS, **options):
    made, tokenizer = made or model(), tiny_models.tokenizer()
    data = prepare(settings, FAMILY, tokenizer, EXAMPLES)
    return recover(
        made, tokenizer, build_graph(FAMILY, made.config), data, strategy, settings, folder,
        load_teacher=lambda: tiny_models.llama(seed=4), **options,
    )  # fmt: skip


def changed(result, name=""):
    """The share of the weights, of parameters whose names contain ``name``, that the training changed."""
    pairs = [
        (one, other)
        for (key, one), other in zip(result.model.named_parameters(), model(torch.float32).parameters(), strict=True)
        if name in key
    ]
    return sum(int((one != other).sum()) for one, other in pairs) / sum(one.numel() for one, _ in pairs)


@pytest.mark.parametrize("strategy", [FullStrategy, DistilStrategy], ids=lambda s: s.name)
def test_a_model_in_bfloat16_learns_as_one_in_float32(tmp_path, strategy):
    wanted = run(tmp_path / "wanted", strategy(), model(torch.float32))
    found, narrow = (run(tmp_path / str(kept), strategy(float32=kept)) for kept in (True, False))
    assert {p.dtype for p in [*found.model.parameters(), *narrow.model.parameters()]} == {torch.bfloat16}
    assert found.losses == pytest.approx(wanted.losses, rel=1e-2)
    before, after = (wanted.validation[place].loss for place in (0, -1))
    assert found.validation[-1].loss == pytest.approx(after, abs=0.02 * (before - after))
    assert narrow.validation[-1].loss > found.validation[-1].loss
    # Tokens that do not occur have no gradients.
    assert changed(found) > 0.9 * changed(wanted) > 0.6
    assert changed(found, "norm") > 0.2 and changed(narrow, "norm") == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_computed_in_which_dtype(tmp_path, dtype, autocast):
    """Products in bfloat16 for models in bfloat16, in float32 for those in float16, unless autocast is asked for."""
    seen = []

    class Watching(RecoveryStrategy):
        name = "watching"

        def train(self, job):
            def loss(model, batch):
                logits = model(input_ids=batch["input_ids"]).logits
                seen.append((logits.dtype, job.model.lm_head.weight.dtype, job.teacher().dtype))
                return logits.float().square().mean()

            return TrainingResult(job.model, fit(job.model, job, loss), 0)

    result = run(tmp_path, Watching(), model(dtype), SETTINGS.model_copy(update={"max_steps": 1, "autocast": autocast}))
    products = torch.bfloat16 if autocast or dtype == torch.bfloat16 else torch.float32
    assert set(seen) == {(products, torch.float32, dtype)}
    assert {p.dtype for p in result.model.parameters()} == {dtype}


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize(
    "strategy", [FullStrategy(), DistilStrategy(), DistilStrategy(top=8)], ids=["full", "distil", "kept"]
)
def test_an_interrupted_training_ends_with_the_same_bytes(tmp_path, strategy, checkpointing):
    settings = SETTINGS.model_copy(update={"max_steps": 12, "gradient_checkpointing": checkpointing})
    whole = run(tmp_path / "whole", strategy, settings=settings)

    def interrupt(step, *_):
        if step == 9:
            raise KeyboardInterrupt

    made = model()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", strategy, made, settings, on_step=interrupt)
    assert made.dtype == torch.bfloat16 and latest_checkpoint(tmp_path / "parts") is not None
    steps = []
    again = run(tmp_path / "parts", strategy, settings=settings, on_step=lambda step, *_: steps.append(step))
    assert 1 < steps[0] <= 9 and again.losses == whole.losses and again.validation == whole.validation
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_the_best_weights_are_rounded_once(tmp_path):
    """They are those of a training that ends there."""
    settings = SETTINGS.model_copy(update={"learning_rate": 0.5, "max_steps": 4, "eval_steps": 2})
    result = run(tmp_path / "four", FullStrategy(), settings=settings)
    ended = run(tmp_path / "two", FullStrategy(), settings=settings.model_copy(update={"max_steps": 2}))
    assert result.best_step == ended.best_step == 2
    for name, value in ended.model.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], value), name


def test_tied_weights_stay_tied(tmp_path):
    made = tiny_models.llama(tied=True).bfloat16()
    result = run(tmp_path, FullStrategy(), made, SETTINGS.model_copy(update={"max_steps": 2}))
    assert result.model.lm_head.weight is result.model.model.embed_tokens.weight
    assert result.model.dtype == torch.bfloat16 and all(p.requires_grad for p in result.model.parameters())


def job_of(made, folder):
    rows = [{"input_ids": list(range(2, 22)), "labels": list(range(2, 22))}] * 4
    return RecoveryJob(made, tiny_models.tokenizer(), rows, build_graph(FAMILY, made.config), SETTINGS, folder)


def test_weights_that_are_not_trained_keep_their_dtype(tmp_path):
    made = model()
    made.requires_grad_(False)
    made.lm_head.weight.requires_grad_(True)
    job = job_of(made, tmp_path)
    with in_float32(made, job) as inside:
        assert {n for n, p in made.named_parameters() if p.dtype == torch.float32} == {"lm_head.weight"}
        assert inside.settings.autocast and not job.settings.autocast
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    with in_float32(made, job, wanted=False) as inside:
        assert inside is job and made.dtype == torch.bfloat16
    whole = model(torch.float32)
    with in_float32(whole, job_of(whole, tmp_path)) as inside:
        assert not inside.settings.autocast


def test_a_model_that_refuses_autocast_computes_in_float32(tmp_path):
    class Adds(nn.Module):
        """As experts of DBRX, which add bfloat16 to float32."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden):
            found = self.inner(hidden)
            return torch.zeros_like(hidden).index_add(0, torch.arange(len(found)), found)

    made = model()
    made.model.layers[0].mlp = Adds(made.model.layers[0].mlp)
    made.model.embed_tokens.requires_grad_(False)
    with in_float32(made, job_of(made, tmp_path)) as inside:
        assert not inside.settings.autocast and {p.dtype for p in made.parameters()} == {torch.float32}
        made(input_ids=torch.arange(2, 9)[None]).logits.sum().backward()
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_in_float32_and_merging_rounds_once(tmp_path, dora, autocast):
    pytest.importorskip("peft")
    settings = SETTINGS.model_copy(update={"max_steps": 3, "learning_rate": 1e-2, "autocast": autocast})
    kinds = [
        run(tmp_path / str(merge), LoraStrategy(dora=dora), settings=settings.model_copy(update={"merge": merge}))
        for merge in (False, True)
    ]
    adapted, merged = (kind.model for kind in kinds)
    assert {p.dtype for n, p in adapted.named_parameters() if "lora_" in n} == {torch.float32}
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    exact = copy.deepcopy(adapted).float().merge_and_unload()
    for name, value in exact.state_dict().items():
        found = merged.state_dict()[name]
        # The sum may lie between two numbers of bfloat16, and be rounded either way.
        torch.testing.assert_close(found, value.bfloat16(), rtol=2**-8, atol=1e-8)
        assert float((found == value.bfloat16()).float().mean()) > 0.99


def test_settings_without_effect_are_refused():
    with pytest.raises(SettingsError, match="float32 has no effect with trains=lora, whose adapters are in float32"):
        DistilStrategy(trains="lora", float32=False)
