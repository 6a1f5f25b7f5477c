"""`fit`: what is trained, in which dtype, from which checkpoint, for how long; never to a higher loss than before."""

import copy
import shutil
import time

import pytest
import tiny_models
import torch
from accelerate import Accelerator
from recovery_cases import dense_model, model_of, pruned_model, train_tiny
from transformers import DbrxConfig, DbrxForCausalLM, MambaConfig, MambaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from llmpruner import DataError, ModelError, OutputError, RecoveryStrategy, SettingsError, UnsupportedModelError
from llmpruner.discovery.groups import build_graph
from llmpruner.models.family import AutoFamily
from llmpruner.models.meta import graph_of
from llmpruner.models.surgery import cut_tensors
from llmpruner.recovery import precision, training
from llmpruner.recovery.data import RecoverySetup, TrainingData
from llmpruner.recovery.losses import next_token_loss
from llmpruner.recovery.recover import train
from llmpruner.recovery.strategies import DistilStrategy, FullStrategy, LoraStrategy, adapter_targets
from llmpruner.recovery.training import filled_in, fit, latest_checkpoint, planned_steps, with_rate
from llmpruner.report.sections import first_and_last, loss_text
from llmpruner.settings import RecoverSettings
from llmpruner.structure.coupling import Blocks, CoupledGroup, Role, Span

STRATEGIES = [FullStrategy(), LoraStrategy(dropout=0.1), DistilStrategy(), DistilStrategy(trains="lora")]
by_name = pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: f"{s.name} {getattr(s.settings, 'trains', '')}")


@pytest.fixture(autouse=True)
def own_precision(monkeypatch):
    """Models in float32 compute in it on every processor."""
    monkeypatch.setattr(precision, "computes_bfloat16_fast", lambda model: False)


@by_name
def test_training_lowers_the_loss_and_returns_the_same_kind_of_model(tmp_path, strategy):
    model, graph = pruned_model()
    kind, before, seen = type(model), copy.deepcopy(model.state_dict()), []
    result = train_tiny(tmp_path, strategy, (model, graph), on_step=lambda *step: seen.append(step))
    after = result.model.state_dict()
    assert type(result.model) is kind and {n: v.shape for n, v in after.items()} == {
        n: v.shape for n, v in before.items()
    }
    assert seen == [(n, 6, loss) for n, loss in enumerate(result.losses, start=1)]
    assert result.record["validation"][-1]["loss"] < result.record["validation"][0]["loss"]
    assert not result.model.training and all(p.requires_grad for p in result.model.parameters())
    assert result.model.config.use_cache
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    adapted = {f"{target}.weight" for target in adapter_targets(result.model, graph)}
    assert moved == (adapted if strategy.needs_peft else set(after))


def test_tied_weights_stay_tied(tmp_path):
    result = train_tiny(tmp_path, FullStrategy(), pruned_model(tied=True))
    assert result.model.lm_head.weight is result.model.model.embed_tokens.weight


def interrupted(folder, strategy, at, **changes):
    """A training that ends at the step ``at``."""

    def interrupt(step, *_):
        if step == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tiny(folder, strategy, on_step=interrupt, **changes)


@pytest.mark.parametrize("strategy", STRATEGIES[1::2], ids=["lora", "distil lora"])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(tmp_path, strategy):
    """With dropout, and with a teacher; the kit of strategies tries the others."""
    whole = train_tiny(tmp_path / "whole", strategy)
    interrupted(tmp_path / "parts", strategy, 5)
    steps = []
    resumed = train_tiny(tmp_path / "parts", strategy, on_step=lambda step, *_: steps.append(step))
    assert 1 < steps[0] <= 5 and steps[-1] == 6
    assert resumed.losses == pytest.approx(whole.losses, abs=1e-6)
    assert resumed.record["validation"] == whole.record["validation"]
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=1e-6, rtol=0)


class Scripted(RecoveryStrategy):
    """Trains the output head, with validation losses that are given beforehand; keeps the weights at each."""

    name = "scripted"
    losses = (5.0, 4.0, 2.0, 3.0, 4.0, 5.0, 6.0)

    def train(self, job):
        model, self.weights, calls = job.model.requires_grad_(False), [], iter(self.losses)
        head = model.lm_head.weight.requires_grad_(True)

        def loss(model, batch):
            value = model(input_ids=batch["input_ids"]).logits.square().mean()
            if torch.is_grad_enabled():
                return value
            self.weights.append(head.detach().clone())
            return value * 0 + next(calls)

        return fit(model, job, loss)


def test_the_result_has_the_weights_with_the_lowest_loss(tmp_path):
    strategy = Scripted()
    # One micro-batch of rows, so that each validation calls the loss once.
    result = train_tiny(tmp_path, strategy, validation=1, batch_size=8)
    record = result.record
    assert [one["loss"] for one in record["validation"]] == list(Scripted.losses)
    assert record["best_step"] == 2 and [one["step"] for one in record["validation"]] == [0, 1, 2, 3, 4, 5, 6]
    assert torch.equal(result.model.lm_head.weight, strategy.weights[2])
    kept = {folder.name for folder in (tmp_path / "work").glob("checkpoint-*")}
    assert kept == {"checkpoint-2", "checkpoint-5"}, "the best and the newest; none at the end"


def test_an_unfinished_checkpoint_is_passed_over(tmp_path):
    for step, file in ((2, "state.json"), (10, "state.json"), (12, ".state.json.1.partial"), (14, "model.safetensors")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / file).touch()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert latest_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_trained_in_float32(tmp_path, dtype):
    seen = []

    class Watching(RecoveryStrategy):
        name = "watching"

        def train(self, job):
            def loss(model, batch):
                logits = model(input_ids=batch["input_ids"]).logits
                seen.append((logits.dtype, job.model.lm_head.weight.dtype, job.teacher().dtype))
                return logits.float().square().mean()

            job.teacher()
            job.model.requires_grad_(True)
            return fit(job.model, job, loss)

    result = train_tiny(tmp_path, Watching(), pruned_model(dtype))
    products = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    assert set(seen) == {(products, torch.float32, dtype)}
    assert {p.dtype for p in result.model.parameters()} == {dtype}


def test_adapters_of_weights_in_float16_are_trained_with_gradients_of_a_wider_range(tmp_path, monkeypatch):
    seen = []

    def watched(model, batch):
        seen.append(model(input_ids=batch["input_ids"]).logits.dtype)
        return next_token_loss(model, batch)

    monkeypatch.setattr(training, "next_token_loss", watched)
    result = train_tiny(tmp_path, LoraStrategy(), pruned_model(torch.float16))
    assert set(seen) == {torch.bfloat16} and {p.dtype for p in result.model.parameters()} == {torch.float16}


def test_operators_that_refuse_autocast_compute_in_the_precision_of_the_weights(tmp_path):
    """DBRX adds what experts give, in bfloat16 under autocast, to sums in float32."""
    parts = {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "hidden_size": 32},
    }
    config = DbrxConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=tiny_models.tokenizer().vocab_size, **parts)
    result = train_tiny(tmp_path, FullStrategy(), (DbrxForCausalLM(config).bfloat16(), None))
    assert result.losses and {p.dtype for p in result.model.parameters()} == {torch.bfloat16}


def test_minutes_end_a_training_that_was_interrupted_too(tmp_path):
    options = {"max_steps": None, "minutes": 0.02, "batch_size": None}
    interrupted(tmp_path, FullStrategy(), 1, **options)
    began = time.monotonic()
    result = train_tiny(tmp_path, FullStrategy(), **options)
    assert 0.5 < time.monotonic() - began < 30
    assert len(result.losses) > 3 and result.record["settings"]["batch_size"] == 2
    assert result.record["validation"][-1]["step"] == len(result.losses)


def filled(rows=500, processes=1, **given):
    return filled_in(RecoverSettings(data="a", **given), rows, processes)


def test_batch_sizes_and_steps_follow_the_number_of_rows():
    assert {rows: filled(rows).batch_size for rows in (10, 500, 7000, 50_000)} == {10: 2, 500: 4, 7000: 64, 50_000: 64}
    assert planned_steps(filled(), 500) == 250
    assert (filled(max_steps=5).batch_size, filled(minutes=5).batch_size) == (64, 2)
    with pytest.raises(SettingsError, match="--batch-size 64 cannot be shared by 3 processes"):
        filled(processes=3, batch_size=64)


def test_the_learning_rate_follows_the_weights_and_the_batch():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    for parameter, size in zip(model.parameters(), (0.2, 9.0, 0.1, 9.0, 9.0, 9.0), strict=True):
        torch.nn.init.constant_(parameter, -size)

    def rate(adapters=False, **given):
        return with_rate(filled(**given), model, adapters).learning_rate

    assert (rate(batch_size=2), rate(batch_size=32)) == (3e-5, 1.2e-4)
    assert (rate(adapters=True), rate(learning_rate=0.5)) == (1e-4, 0.5)
    half = model.bfloat16()
    assert with_rate(filled(batch_size=2), half, adapters=False).learning_rate == 3e-5


def test_one_process_trains_on_the_device_of_the_model_alone(tmp_path, monkeypatch):
    """Not on the one that accelerate prefers, nor with a batch for each GPU of the machine."""
    monkeypatch.setattr(Accelerator, "device", torch.device("meta"))
    rows = []

    def watched(model, batch):
        rows.extend(batch["input_ids"] if torch.is_grad_enabled() else ())
        return next_token_loss(model, batch)

    train_tiny(tmp_path, With(watched), max_steps=1)
    assert len(rows) == 4 and {row.device.type for row in rows} == {"cpu"}


def test_another_job_does_not_go_on_from_a_checkpoint(tmp_path):
    train_tiny(tmp_path, LoraStrategy(), max_steps=1)
    with pytest.raises(OutputError, match=r"another recovery \(settings differ\); start anew with --restart"):
        train_tiny(tmp_path, LoraStrategy(), max_steps=2)
    with pytest.raises(OutputError, match=r"\(strategy, strategy_settings differ\)"):
        train_tiny(tmp_path, FullStrategy(), max_steps=1)
    with pytest.raises(OutputError, match=r"\(model differ\)"):
        train_tiny(tmp_path, LoraStrategy(), (dense_model(), pruned_model()[1]), max_steps=1)
    for folder in (tmp_path / "work").glob("checkpoint-*"):
        shutil.rmtree(folder)
    assert len(train_tiny(tmp_path, LoraStrategy(), max_steps=2).losses) == 2


def test_a_training_that_diverges_stops(tmp_path):
    model, graph = pruned_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="became nan at step 0; the weights of the model are damaged"):
        train_tiny(tmp_path, LoraStrategy(), (model, graph))


def test_a_tokenizer_of_another_model_is_named(tmp_path):
    loaded = model_of(*pruned_model())
    loaded.network.resize_token_embeddings(50)
    known, unknown = ([{"input_ids": [3, token], "labels": [3, token]}] for token in (49, 50))
    for data in (TrainingData(1, unknown, known, True), TrainingData(1, known, unknown, True)):
        with pytest.raises(DataError, match="it is that of another model"):
            train(loaded, RecoverySetup(RecoverSettings(), FullStrategy()), data, tmp_path, dense_model)


# Adapters


def test_experts_get_no_adapters():
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=300, hidden_size=32, intermediate_size=16, num_hidden_layers=1, **heads)
    model, path = MixtralForCausalLM(config).eval(), "model.layers.0"
    experts, output = f"{path}.mlp.experts.down_proj", f"{path}.self_attn.o_proj.weight"
    groups = [
        CoupledGroup("mlp", "mlp", 16, (Span(experts, 2, Role.CONSUMES, Blocks(16)),), layer=0),
        CoupledGroup("attention", "attention", 2, (Span(output, 1, Role.CONSUMES, Blocks(2, 16)),), layer=0),
    ]
    assert adapter_targets(model, graph_of(model, groups)) == [f"{path}.self_attn.o_proj"]
    with pytest.raises(UnsupportedModelError, match="nothing to adapt"):
        adapter_targets(model, graph_of(model, groups[:1]))


def test_adapters_for_conv1d_modules(tmp_path):
    model = tiny_models.gpt2(positions=64)
    graph = build_graph(AutoFamily(), model.config)
    graph = cut_tensors(model, graph, {"layers.1.mlp": range(0, 64, 2)})
    result = train_tiny(tmp_path, LoraStrategy(), (model, graph))
    assert isinstance(result.model.transformer.h[1].mlp.c_fc, Conv1D)
    assert result.record["best_step"] > 0


def test_modules_that_peft_refuses_are_named(tmp_path):
    model = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    graph = build_graph(AutoFamily(), model.config)
    with pytest.raises(UnsupportedModelError, match="peft has no adapters for a mamba model"):
        train_tiny(tmp_path, LoraStrategy(), (model, graph))


# No higher loss than at the start


def away(model, batch):
    """A loss whose gradient leads to higher values of it."""
    loss = next_token_loss(model, batch)
    return -loss if torch.is_grad_enabled() else loss


def lucky():
    """A loss that after a step is lower by 0.3 on one row, and higher by 0.2 on another."""
    changes = []

    def loss(model, batch):
        value = next_token_loss(model, batch)
        if torch.is_grad_enabled():
            changes[:] = [0.2, -0.3]
            return value
        return value * 0 + 2 + (changes.pop() if changes else 0)

    return loss


class With(RecoveryStrategy):
    name = "with"

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def train(self, job):
        job.model.requires_grad_(True)
        return fit(job.model, job, self.loss)


@pytest.mark.parametrize(
    ("loss", "options"), [(away, {}), (away, {"validation": 0}), (away, {"max_steps": 1}), (lucky(), {"max_steps": 1})]
)
def test_a_result_that_is_no_better_has_the_weights_of_the_start(tmp_path, loss, options):
    model, graph = pruned_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = train_tiny(tmp_path, With(loss), (model, graph), **options)
    record = result.record
    first, *_, last = record["validation"]
    assert record["best_step"] == 0 and record["improved"] is False
    assert last["loss"] + last["error"] > first["loss"] and (last["loss"] < first["loss"]) == (loss is not away)
    assert record["held_out"] == (options.get("validation") != 0)
    assert "no better than before" in loss_text(record) and first_and_last(record)[2] == first["loss"]
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_weights_of_the_start_are_found_in_a_folder_that_was_moved(tmp_path):
    """Between an interruption and the rest of the training."""
    interrupted(tmp_path / "before", With(away), 3)
    (tmp_path / "before").rename(tmp_path / "after")
    result = train_tiny(tmp_path / "after", With(away))
    assert result.record["best_step"] == 0 and len(result.losses) == 6
    for name, value in pruned_model()[0].state_dict().items():
        assert torch.equal(result.model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("base", "dtype", "rate"),
    [(FullStrategy, torch.float32, 1e-4), (FullStrategy, torch.bfloat16, 1e-4), (LoraStrategy, torch.bfloat16, 5e-3)],
)
def test_the_loss_is_that_of_the_weights_as_they_are_saved(tmp_path, base, dtype, rate):
    """At a rate of which bfloat16 keeps little, and where merging adapters rounds."""
    rows = []

    class Kept(base):
        def train(self, job):
            rows.extend(job.validation)
            return super().train(job)

    result = train_tiny(tmp_path, Kept(), pruned_model(dtype), learning_rate=rate, max_steps=3)
    assert result.record["best_step"] > 0 and {p.dtype for p in result.model.parameters()} == {dtype}
    # Weights that are trained are in float32, under autocast.
    widened = base is FullStrategy and dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=widened):
        model, total = result.model.float() if widened else result.model, 0.0
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
            total += float(next_token_loss(model, batch)) * (ids.numel() - 1)
    mean = total / sum(len(row["input_ids"]) - 1 for row in rows)
    assert first_and_last(result.record)[2] == pytest.approx(mean, abs=1e-6)
