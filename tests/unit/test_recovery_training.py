import copy
import json

import pytest
import tiny_models
import torch
from llmpruner_llama.family import LlamaFamily
from safetensors.torch import save_file

from llmpruner import (
    MLP,
    Blocks,
    Catalog,
    CheckpointError,
    CoupledGroup,
    ModelError,
    OutputError,
    RecoveryStrategy,
    Role,
    Span,
    UnsupportedModelError,
)
from llmpruner.calibration.chat import TrainingText, Turn
from llmpruner.discovery.groups import build_graph
from llmpruner.errors import PluginError
from llmpruner.folders import alone_in
from llmpruner.models.checkpoint import save_adapter
from llmpruner.models.meta import graph_of
from llmpruner.models.save import save_checkpoint
from llmpruner.models.surgery import cut
from llmpruner.plugins.manager import plugin_manager
from llmpruner.recovery.adapters import adapter_targets
from llmpruner.recovery.best import BestWeights
from llmpruner.recovery.distil import DistilStrategy
from llmpruner.recovery.examples import Examples
from llmpruner.recovery.full import FullStrategy
from llmpruner.recovery.lora import LoraStrategy
from llmpruner.recovery.run import recover
from llmpruner.recovery.schedule import micro_batch, steps
from llmpruner.recovery.training import latest_checkpoint
from llmpruner.recovery.training_data import prepare
from llmpruner.settings import RecoverSettings

pytest.importorskip("peft")

FAMILY = LlamaFamily()
EXAMPLES = Examples(
    tuple(
        TrainingText((Turn(f"Question {n}: what is the capital?\n", "Paris is the capital of France."),))
        for n in range(12)
    ),
    "here",
)
SETTINGS = RecoverSettings(
    data="here", batch_size=4, micro_batch_size=2, epochs=2, learning_rate=5e-3, warmup_steps=0, cutoff=48
)
STRATEGIES = [LoraStrategy(dropout=0.1), FullStrategy()]


def pruned(tied=False):
    """A tiny LLaMA whose layers differ in heads and in width."""
    model = tiny_models.llama(tied=tied)
    graph = build_graph(FAMILY, model.config)
    kept = {"layers.0.mlp": range(30), "layers.1.mlp": range(3, 48), "layers.1.attention": [1]}
    return model, cut(model, graph, kept, FAMILY)


def run(model, graph, work_dir, strategy, settings=SETTINGS, **options):
    tokenizer = tiny_models.tokenizer()
    data = prepare(settings, FAMILY, tokenizer, EXAMPLES)
    return recover(model, tokenizer, graph, data, strategy, settings, work_dir, **options)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.name)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_training_lowers_the_loss_and_returns_the_same_kind_of_model(tmp_path, strategy, tied):
    model, graph = pruned(tied)
    kind, shapes, before = type(model), shapes_of(model), copy.deepcopy(model.state_dict())
    seen = []
    result = run(model, graph, tmp_path / "work", strategy, on_step=lambda *step: seen.append(step))
    assert type(result.model) is kind and shapes_of(result.model) == shapes
    assert len(result.losses) == 6 and result.losses[-1] < result.losses[0] - 0.1
    assert seen == [(n, 6, loss) for n, loss in enumerate(result.losses, start=1)]
    assert not result.model.training and all(p.requires_grad for p in result.model.parameters())
    assert (result.model.lm_head.weight is result.model.model.embed_tokens.weight) is tied
    after = result.model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    if strategy.name == "lora":
        assert moved == {f"{target}.weight" for target in adapter_targets(result.model, graph)[0]}
        assert len(moved) == 2 * 7
    else:
        assert moved == set(after)
    assert result.model.config.use_cache
    assert result.examples == 12 and result.fingerprint == EXAMPLES.fingerprint


def shapes_of(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.name)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, strategy):
    whole = run(*pruned(), tmp_path / "whole", strategy)

    def interrupt(step, total, loss):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(*pruned(), tmp_path / "parts", strategy, on_step=interrupt)
    assert latest_checkpoint(tmp_path / "parts") is not None
    steps_taken = []
    resumed = run(*pruned(), tmp_path / "parts", strategy, on_step=lambda step, *_: steps_taken.append(step))
    assert steps_taken and steps_taken[0] > 1 and steps_taken[-1] == 6
    assert resumed.losses == pytest.approx(whole.losses, abs=1e-6)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=1e-6, rtol=0)


def test_an_unfinished_checkpoint_is_passed_over(tmp_path):
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"global'), (14, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert latest_checkpoint(tmp_path / "none") is None


def test_a_checkpoint_with_a_file_that_is_cut_off_is_passed_over(tmp_path):
    names = ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json")
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"a": torch.zeros(9)}, folder / names[0])
        torch.save({"a": torch.zeros(9)}, folder / names[1])
        torch.save({"a": torch.zeros(9)}, folder / names[2])
        (folder / names[3]).write_text(json.dumps({"global_step": step}))
    assert latest_checkpoint(tmp_path) == str(folder)
    for name in names:
        content = (folder / name).read_bytes()
        for left in (content[:-3], b"", b"[]"):
            (folder / name).write_bytes(left)
            assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2"), (name, left)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("damage", [b"", b"[1]", b'"a"', b"\xff\xfe"])
def test_damaged_files_of_a_work_dir_are_named(tmp_path, damage):
    model, graph = pruned()
    (tmp_path / "job.json").write_bytes(damage)
    with pytest.raises(OutputError, match=r"job\.json is damaged; delete"):
        run(model, graph, tmp_path, FullStrategy())
    (tmp_path / "best-3.safetensors").write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"best-3\.safetensors is missing or damaged"):
        BestWeights(tmp_path).restore(model, 3)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path):
    settings = RecoverSettings(data="here", batch_size=4, max_steps=2, learning_rate=5e-3, cutoff=32)
    first, again = (run(*pruned(), tmp_path / name, LoraStrategy(), settings).losses for name in ("a", "b"))
    other = RecoverSettings(data="here", batch_size=4, max_steps=2, learning_rate=5e-3, cutoff=32, seed=1)
    assert first == again != run(*pruned(), tmp_path / "c", LoraStrategy(), other).losses


def test_two_runs_do_not_train_in_one_work_dir(tmp_path):
    settings = RecoverSettings(data="here", batch_size=4, max_steps=1, cutoff=32)
    (tmp_path / "work").mkdir()
    with alone_in(tmp_path / "work"), pytest.raises(OutputError, match="another run works in"):
        run(*pruned(), tmp_path / "work", FullStrategy(), settings)
    assert len(run(*pruned(), tmp_path / "work", FullStrategy(), settings).losses) == 1


def test_another_job_does_not_continue_from_a_work_dir(tmp_path):
    settings = RecoverSettings(data="here", batch_size=4, max_steps=1, cutoff=32)
    run(*pruned(), tmp_path / "work", LoraStrategy(), settings)
    with pytest.raises(OutputError, match=r"another recovery job \(settings differ\)"):
        run(
            *pruned(),
            tmp_path / "work",
            LoraStrategy(),
            RecoverSettings(data="here", batch_size=4, max_steps=2, cutoff=32),
        )
    with pytest.raises(OutputError, match=r"another recovery job \(model differ\)"):
        model = tiny_models.llama(seed=3)
        run(model, build_graph(FAMILY, model.config), tmp_path / "work", LoraStrategy(), settings)
    with pytest.raises(OutputError, match=r"another recovery job \(strategy settings differ\)"):
        run(*pruned(), tmp_path / "work", LoraStrategy(rank=4), settings)
    with pytest.raises(OutputError, match=r"another recovery job \(strategy, strategy settings differ\)"):
        run(*pruned(), tmp_path / "work", FullStrategy(), settings)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(OutputError, match="is not empty and holds no recovery job"):
        run(*pruned(), tmp_path / "other", LoraStrategy(), settings)


def test_unmerged_adapters_reproduce_the_merged_model(tmp_path):
    settings = RecoverSettings(data="here", batch_size=4, max_steps=2, learning_rate=5e-3, cutoff=32)
    merged = run(*pruned(), tmp_path / "a", LoraStrategy(), settings).model
    adapted = run(*pruned(), tmp_path / "b", LoraStrategy(), settings.model_copy(update={"merge": False})).model
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-5, rtol=1e-5)
    adapted.save_pretrained(tmp_path / "adapters")
    saved = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert saved["r"] == 8 and saved["lora_alpha"] == 16


@pytest.mark.parametrize("strategy", [LoraStrategy, DistilStrategy], ids=lambda s: s.name)
@pytest.mark.parametrize("variant", [{"rslora": True}, {"dora": True}, {"rslora": True, "dora": True}], ids=str)
def test_variants_of_lora_load_with_peft_and_merge_into_a_plain_checkpoint(tmp_path, variant, strategy):
    """The logits of the adapters on the base, of the merged model, and of its checkpoint agree within 1e-4, relative
    to the largest."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_models.llama()
    graph = build_graph(FAMILY, base.config)
    graph = cut(base, graph, {f"layers.{n}.mlp": range(32) for n in range(2)}, FAMILY)
    assert save_checkpoint(base, tmp_path / "base", record=None, family=FAMILY) == "stock"
    kind = strategy(**variant, rank=4, **({"trains": "lora"} if strategy is DistilStrategy else {}))
    teacher = {"load_teacher": tiny_models.llama}
    settings = RecoverSettings(data="here", batch_size=4, max_steps=3, learning_rate=2e-2, warmup_steps=0, cutoff=32)
    models = [
        run(
            copy.deepcopy(base),
            graph,
            tmp_path / str(merge),
            kind,
            settings.model_copy(update={"merge": merge}),
            **teacher,
        )
        for merge in (False, True)
    ]
    adapted, merged = (result.model for result in models)
    assert models[0].losses == models[1].losses and not hasattr(merged, "peft_config")
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj
    assert layer.scaling["default"] == (16 / 2 if variant.get("rslora") else 16 / 4)
    assert bool(layer.lora_magnitude_vector) == bool(variant.get("dora"))
    save_adapter(adapted, tmp_path / "adapter", base=str(tmp_path / "base"), tokenizer=None)
    save_checkpoint(merged, tmp_path / "merged", record=None, family=FAMILY)
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        plain, expected, *found = (m.eval()(ids).logits for m in (base, adapted, merged, by_peft, again))
    limit = 1e-4 * float(expected.abs().max())
    assert float((expected - plain).abs().max()) > 100 * limit
    assert all(float((one - expected).abs().max()) < limit for one in found)


def test_merging_keeps_the_dtype(tmp_path):
    model, graph = pruned(tied=True)
    settings = RecoverSettings(data="here", batch_size=4, max_steps=1, cutoff=32)
    result = run(model.bfloat16(), graph, tmp_path / "work", LoraStrategy(), settings)
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}


def test_autocast_trains_to_nearly_the_same_loss(tmp_path):
    settings = RecoverSettings(data="here", batch_size=4, max_steps=2, cutoff=32, autocast=True)
    full = run(
        *pruned(), tmp_path / "a", LoraStrategy(), RecoverSettings(data="here", batch_size=4, max_steps=2, cutoff=32)
    )
    half = run(*pruned(), tmp_path / "b", LoraStrategy(), settings)
    assert half.losses == pytest.approx(full.losses, rel=1e-2) and half.losses != full.losses
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}


def test_adapters_for_conv1d_modules(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    channel = Blocks(128)
    groups = [
        CoupledGroup(
            f"layers.{n}.mlp",
            MLP,
            128,
            (
                Span(f"transformer.h.{n}.mlp.c_fc.weight", 1, Role.PRODUCES, channel),
                Span(f"transformer.h.{n}.mlp.c_fc.bias", 0, Role.PRODUCES, channel),
                Span(f"transformer.h.{n}.mlp.c_proj.weight", 0, Role.CONSUMES, channel),
            ),
            layer=n,
        )
        for n in range(2)
    ]
    graph = graph_of(model, lambda: groups)
    graph = cut(model, graph, {"layers.1.mlp": range(0, 128, 2)})
    assert model.transformer.h[1].mlp.c_fc.weight.shape == (32, 64)
    result = run(model, graph, tmp_path / "work", LoraStrategy())
    assert isinstance(result.model.transformer.h[1].mlp.c_fc, Conv1D)
    assert result.losses[-1] < result.losses[0]


def test_experts_are_skipped_with_a_note(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = MixtralForCausalLM(config).eval()
    path, wide = "model.layers.0", Blocks(2, 16)
    experts = f"{path}.mlp.experts.down_proj"
    groups = [
        CoupledGroup("layers.0.mlp", MLP, 16, (Span(experts, 2, Role.CONSUMES, Blocks(16)),), layer=0),
        CoupledGroup(
            "layers.0.attention",
            "attention",
            2,
            (Span(f"{path}.self_attn.o_proj.weight", 1, Role.CONSUMES, wide),),
            layer=0,
        ),
    ]
    graph = graph_of(model, lambda: groups)
    assert adapter_targets(model, graph) == ([f"{path}.self_attn.o_proj"], [experts])
    settings = RecoverSettings(data="here", batch_size=4, max_steps=1, cutoff=32)
    result = run(model, graph, tmp_path / "work", LoraStrategy(), settings)
    assert "1 parameter of experts gets no adapters" in result.notes[0]
    with pytest.raises(UnsupportedModelError, match="nothing to adapt"):
        adapter_targets(model, graph_of(model, lambda: groups[:1]))


def test_modules_that_peft_refuses_are_skipped_with_a_note(tmp_path):
    """peft refuses Mamba's output projection, which was a traceback."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    graph = build_graph(Catalog(plugin_manager()).families["auto"](), model.config)
    path = "backbone.layers.0.mixer"
    assert f"{path}.out_proj" in adapter_targets(model, graph)[0]
    before = copy.deepcopy(model.state_dict())
    settings = RecoverSettings(data="here", batch_size=4, max_steps=2, cutoff=32, warmup_steps=0)
    result = run(model, graph, tmp_path / "work", LoraStrategy(), settings)
    assert f"2 modules, which peft refuses, get no adapters ({path}.out_proj, …)" in result.notes
    assert not any("experts" in note for note in result.notes)  # the weight of a convolution has three axes, too
    after = result.model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert f"{path}.in_proj.weight" in moved and f"{path}.out_proj.weight" not in moved


def test_a_diverged_run_stops(tmp_path):
    model, graph = pruned()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    rows = r"the rows 1, 6, 9, 10 of the data \(here, example 1; here, example 6; .*\)"
    with pytest.raises(ModelError, match=f"the loss became nan at step 1, with {rows}; lower the learning rate"):
        run(model, graph, tmp_path / "work", LoraStrategy())


def test_a_strategy_must_return_a_training_result(tmp_path):
    class Odd(RecoveryStrategy):
        name = "odd"

        def train(self, job):
            return job.model

    with pytest.raises(PluginError, match="'odd' returned LlamaForCausalLM, not a TrainingResult"):
        run(*pruned(), tmp_path / "work", Odd())


def test_the_record_has_the_training_settings(tmp_path):
    settings = RecoverSettings(data="elsewhere", batch_size=4, max_steps=2, cutoff=32, rank=3, limit=5)
    result = run(*pruned(), tmp_path / "work", LoraStrategy(rank=4), settings)
    record = result.record()
    assert json.loads(json.dumps(record)) == record
    assert record.pop("settings") == {
        "learning_rate": 1e-4, "epochs": 2.0, "max_steps": 2, "batch_size": 4, "micro_batch_size": 4, "cutoff": 32,
        "pack": False, "warmup_steps": None, "loss_on": "all", "autocast": False, "seed": 0, "schedule": "linear",
        "weight_decay": 0.0, "minutes": None, "gradient_checkpointing": "auto", "validation": 0.02,
        "validation_data": None, "eval_steps": None, "patience": None,
    }  # fmt: skip
    assert record == {
        "strategy": "lora",
        "strategy_settings": {"rank": 4, "alpha": 16, "dropout": 0.05, "rslora": False, "dora": False},
        "data": "here",
        "fingerprint": EXAMPLES.fingerprint,
        "examples": 12,
        "trainable_parameters": result.trainable_parameters,
        "losses": list(result.losses),
        "validation_examples": 0,
        "validation": [],
        "best_step": None,
    }


@pytest.mark.parametrize(("micro", "batch", "expected"), [(4, 64, 4), (4, 6, 3), (8, 4, 4), (4, 7, 1)])
def test_micro_batches_divide_the_batch(micro, batch, expected):
    assert micro_batch(RecoverSettings(data="here", batch_size=batch, micro_batch_size=micro)) == expected


@pytest.mark.slow
def test_the_number_of_steps_agrees_with_the_trainer(tmp_path):
    for batch, epochs in ((5, 1.0), (8, 1.5), (64, 2.0)):
        settings = RecoverSettings(data="here", batch_size=batch, epochs=epochs, cutoff=16)
        result = run(*pruned(), tmp_path / f"{batch}", LoraStrategy(), settings)
        assert len(result.losses) == steps(settings, len(EXAMPLES.texts))


def test_training_prints_nothing(tmp_path, capfd):
    run(
        *pruned(), tmp_path / "work", LoraStrategy(), RecoverSettings(data="here", batch_size=4, max_steps=1, cutoff=32)
    )
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
