"""Weights in 8 and 4 bits: what is written gives the outputs of what was quantised, and what cannot be is refused."""

from __future__ import annotations

from types import SimpleNamespace

import llmpruner_torchao
import pytest
import tiny_models
import torch
from checkpoint_cases import INPUT_IDS, cut_llama
from llmpruner_llama import LlamaFamily
from llmpruner_torchao import TorchAoExporter, linear_layers

import llmpruner
from llmpruner import LlmprunerError, MissingExtraError, UnsupportedModelError, load_pruned
from llmpruner.discovery.oracle import logits
from llmpruner.exporters import export
from llmpruner.models.numbers import first_not_finite, stored_bytes


def loaded(model, tokenizer=None):
    record = {"plans": [], "files": {"model.safetensors": {"bytes": 1, "sha256": ""}}}  # of the source
    return lambda: SimpleNamespace(network=model, tokenizer=tokenizer, family=LlamaFamily(), record=record)


@pytest.fixture
def installed():
    pytest.importorskip("torchao", reason="needs pip install '.[torchao]'")


@pytest.mark.parametrize("cut", ["mlp-uniform", "mlp"])
def test_eight_bits(installed, tmp_path, cut):
    model = cut_llama(cut)
    expected = logits(model, INPUT_IDS)
    line = export(tmp_path, TorchAoExporter(), tmp_path / "out", loaded(model))
    again = load_pruned(tmp_path / "out")
    files = {"config.json", "generation_config.json", "llmpruner.json", "model.safetensors"}
    own = {file.name for file in (tmp_path / "out").iterdir()}
    assert own == files | ({"modeling_llmpruner.py"} if cut == "mlp" else set())
    for _, module in linear_layers(again):
        assert stored_bytes(module.weight) < 2 * module.weight.numel()
    head = again.get_output_embeddings().weight
    assert stored_bytes(head) == 4 * head.numel()
    found = logits(again, INPUT_IDS)
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert "MiB of weights became" in line
    assert first_not_finite(again.named_parameters()) is None


def test_it_can_be_used_further(installed, tmp_path):
    folder = tmp_path / "dense"
    tiny_models.llama().save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    llmpruner.export(folder, to="torchao", output=tmp_path / "out", load=llmpruner.LoadSettings(dtype="bfloat16"))
    result = llmpruner.bench([folder, tmp_path / "out"], batch=1, prompt=4, new=2, rounds=1)
    assert result.cases[0].models[1].decode.ideal > 1.5
    dense, quantised = llmpruner.evaluate([folder, tmp_path / "out"], metrics="size")
    assert quantised.parameters == dense.parameters and quantised.weight_bytes < dense.weight_bytes


def test_a_pruned_model_is_whole_after_the_export(installed, tmp_path):
    tiny_models.llama().save_pretrained(tmp_path / "dense")
    llmpruner.prune(tmp_path / "dense", ratio=0.2, importance="l1", output=tmp_path / "pruned")
    llmpruner.export(tmp_path / "pruned", to="torchao", output=tmp_path / "out")
    states = {check.name: check.state for check in llmpruner.verify_checkpoint(tmp_path / "out").checks}
    assert states == {"files": "passed", **dict.fromkeys(("shapes", "weights", "logits"), "not checked")}
    with pytest.raises(UnsupportedModelError, match="is quantised"):
        llmpruner.prune(tmp_path / "out", ratio=0.2, importance="l1", output=tmp_path / "again")
    assert llmpruner.load(tmp_path / "out").plans


def test_a_written_checkpoint_is_read_back(installed, tmp_path, monkeypatch):
    def damaged(*arguments, **options):
        model = load_pruned(*arguments, **options)
        model.get_output_embeddings().weight.data[5] += 1.0
        return model

    monkeypatch.setattr(llmpruner, "load_pruned", damaged)
    with pytest.raises(LlmprunerError, match="gives other outputs"):
        export(tmp_path, TorchAoExporter(), tmp_path / "out", loaded(cut_llama("mlp")))
    assert not list(tmp_path.iterdir())


def test_without_torchao(tmp_path, monkeypatch):
    monkeypatch.setattr(llmpruner_torchao, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[torchao\]'"):
        export(tmp_path, TorchAoExporter(), tmp_path / "out", None)


@pytest.mark.parametrize(("group", "message"), [
    # Hidden states have 32 channels, and MLPs 64.
    (64, "multiples of 64, and '.*q_proj' has 32; give a smaller torchao.group, prune with prune.round_to=64, or"),
    (32, "only on NVIDIA GPUs of compute capability 8.0 or newer; give --device cuda, or"),
])  # fmt: skip
def test_what_four_bits_refuse(monkeypatch, tmp_path, group, message):
    monkeypatch.setattr(llmpruner_torchao, "find_spec", lambda name: True)
    with pytest.raises(LlmprunerError, match=message):
        export(tmp_path, TorchAoExporter(scheme="int4", group=group), tmp_path / "out", loaded(wide()))
    assert not list(tmp_path.iterdir())


def wide():
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **shape)).eval()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="packs on NVIDIA GPUs alone")
def test_four_bits(installed, tmp_path):
    model = wide().to("cuda", torch.bfloat16)
    line = export(tmp_path, TorchAoExporter(scheme="int4", group=32), tmp_path / "out", loaded(model))
    assert "MiB of weights became" in line
