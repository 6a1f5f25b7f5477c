"""Checkpoints: what saving and loading refuse and keep; and every kind of cut model, loaded in fresh processes with and
without llmpruner."""

import copy
import json
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from checkpoint_cases import EVERY, INPUT_IDS, LLAMA, SIZES, cut_llama
from fresh import run_fresh
from llmpruner_llama import LlamaFamily
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import llmpruner
from llmpruner import CheckpointError, ModelError, build_graph, load_pruned, save_checkpoint
from llmpruner.discovery.cut import cut
from llmpruner.discovery.oracle import logits
from llmpruner.models.modeling_llmpruner import pruned_config
from llmpruner.structure.kept import restrict

FAMILY = LlamaFamily()


@pytest.fixture
def shim(tmp_path):
    save_checkpoint(cut_llama("mlp-tied"), tmp_path / "shim", record={"plan": 1})
    return tmp_path / "shim"


def test_the_configuration_class_of_a_shim_has_defaults():
    """transformers 5.19, which vLLM 0.32 brings, compares a configuration with one without values."""
    assert pruned_config(LlamaConfig)().to_dict()["model_type"] == "llama"


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = cut_llama("mlp")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.inf
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite"):
        save_checkpoint(model, tmp_path / "out", record={})
    assert list(tmp_path.iterdir()) == []


def test_what_no_record_can_state_is_refused(tmp_path):
    model = cut_llama("mlp")
    model.model.norm.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(CheckpointError, match="gives other outputs than the cut LlamaForCausalLM"):
        save_checkpoint(model, tmp_path / "out", record={})
    model = cut_llama("mlp")
    model.model.layers[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"only the model has the parameter 'model\.layers\.0\.extra\.bias'"):
        save_checkpoint(model, tmp_path / "out", record={})
    assert list(tmp_path.iterdir()) == []


def test_a_shim_without_its_record_is_said_to_be_one(shim):
    """As the hub id of one, whose record is not on this machine."""
    (shim / "llmpruner.json").unlink()
    for opened in (llmpruner.load, llmpruner.discover):
        with pytest.raises(ModelError, match=r"shim' was pruned to layers of different sizes, .*hf download REPO"):
            opened(shim)


def test_a_missing_tensor_or_file_is_named(shim):
    tensors = load_file(shim / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, shim / "model.safetensors", metadata={"format": "pt"})
    (shim / "llmpruner.json").unlink()  # of files without the tensor
    with pytest.raises(CheckpointError, match=r"missing tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        load_pruned(shim)
    (shim / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="shim cannot be loaded: "):
        load_pruned(shim)


def test_a_record_that_contradicts_the_weights_is_refused(shim):
    config = json.loads((shim / "config.json").read_text())
    config["llmpruner"]["shapes"]["model.layers.1.mlp.up_proj.weight"] = [9, 32]
    (shim / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"mismatched tensor .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_pruned(shim)


def test_a_checkpoint_does_not_choose_what_is_imported(shim, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    config = json.loads((shim / "config.json").read_text())
    config["llmpruner"] |= {"base": "EvilForCausalLM", "module": "evil"}
    (shim / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"needs the model class EvilForCausalLM, .* plugin \(evil\)"):
        load_pruned(shim)


def test_the_model_is_left_as_it_was(tmp_path):
    model = cut_llama("mlp-tied").train()
    before, config = {n: t.data_ptr() for n, t in model.state_dict().items()}, model.config.to_dict()
    save_checkpoint(model, tmp_path / "out", record={})
    assert model.training
    assert {n: t.data_ptr() for n, t in model.state_dict().items()} == before
    assert model.config.to_dict() == config


@pytest.mark.parametrize("name", ["mlp", "depth-mlp", "query"])
def test_a_pruned_model_is_pruned_again(name, tmp_path):
    """First to other shapes, with a shim upon a shim; then to uniform ones, which a stock model can state."""
    case = LLAMA[name]
    save_checkpoint(cut_llama(name), tmp_path / "once", record={}, family=FAMILY)
    graph = restrict(build_graph(FAMILY, LlamaConfig(**{**SIZES, **case.options})), case.kept)
    model = load_pruned(tmp_path / "once")
    remaining = cut(model, graph, {"layers.0.mlp": range(5)}, FAMILY)
    assert save_checkpoint(model, tmp_path / "twice", record={}, family=FAMILY) == "shim"
    again = load_pruned(tmp_path / "twice")
    assert torch.equal(logits(again, INPUT_IDS), logits(model, INPUT_IDS))
    kept = {group.name: range(5) for group in remaining.groups if group.kind == "mlp"}
    kept |= {group.name: [0, group.units // 2] for group in remaining.groups if group.kind == "query"}
    kept |= {group.name: [0, 2] for group in remaining.groups if group.kind == "query" and group.units == 4}
    cut(again, remaining, kept, FAMILY)
    assert save_checkpoint(again, tmp_path / "thrice", record={}, family=FAMILY) == "stock"
    assert torch.equal(logits(load_pruned(tmp_path / "thrice"), INPUT_IDS), logits(again, INPUT_IDS))


def test_a_shim_of_stock_shapes_is_not_taken_for_a_stock_model(tmp_path):
    """Every second layer has experts: with the first layer gone, the stock class would put them into the others."""
    config = transformers.Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=4,
        shared_expert_intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2, decoder_sparse_step=2, head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "dense")
    found = llmpruner.prune(
        str(tmp_path / "dense"), ratio=0.17, kinds="layer", layers="0", importance="l1", output=tmp_path / "out",
    )  # fmt: skip
    stated = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found.form == "shim" and not stated["llmpruner"].get("shapes")
    assert stated["model_type"] == "llmpruner_qwen2_moe"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    torch.testing.assert_close(logits(loaded, INPUT_IDS), logits(found.network, INPUT_IDS), atol=1e-5, rtol=0)
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["model_type"] == "llmpruner_qwen2_moe"
    with pytest.raises(ValueError):  # transformers asks for the flag, or does not know the type
        transformers.AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=False)


# Published models have generation configurations that transformers loads, and refuses to save.
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
REFUSED = {
    "a padding token of -1": ({"pad_token_id": -1}, {"pad_token_id": None}),
    "and no sampling": ({"pad_token_id": -1, "temperature": 0.6}, {"do_sample": True, "temperature": 0.6}),
    "sampling alone": ({"top_p": 0.9}, {"do_sample": True, "top_p": 0.9}),
    "scores that are not returned": ({"output_scores": True, "top_k": None}, {"do_sample": None}),
    "no samples and scores": ({"output_scores": True, "do_sample": False}, {}),
    "a cache that is not used": ({"use_cache": False, "cache_implementation": "static"}, {}),
    "many beams": ({"num_beams": 1, "length_penalty": 0.5, "pad_token_id": -1}, {}),
}


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
@pytest.mark.parametrize(("options", "kept"), REFUSED.values(), ids=REFUSED)
def test_a_pruned_model_has_a_valid_generation_config(options, kept, place, tmp_path):
    tiny_models.llama().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    file = tmp_path / "model" / place
    values = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**values, **options, **TOKENS}))
    llmpruner.prune(tmp_path / "model", unit_ratio=0.25, importance="l1", output=tmp_path / "pruned")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").generation_config
    found.validate(strict=True)
    assert {name: getattr(found, name) for name in (*TOKENS, *kept)} == {**TOKENS, **kept}


# In fresh processes


PROBE = Path(__file__).with_name("checkpoint_probe.py")
MODES = ("remote", "registered", "load_pruned")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directory of all checkpoints, and the form each was saved in."""
    root = tmp_path_factory.mktemp("checkpoints")
    forms = {}
    for name, (make, _) in EVERY.items():
        model = make()
        family = LlamaFamily() if name in LLAMA else None
        forms[name] = save_checkpoint(model, root / name, record={"name": name}, family=family)
        half = copy.deepcopy(model)
        for parameter in half.parameters():  # as `from_pretrained` does it: the rotary tables stay as they are
            parameter.data = parameter.data.bfloat16()
        expected = {"default": logits(model, INPUT_IDS), "bfloat16": logits(half, INPUT_IDS)}
        model.set_attn_implementation("eager")
        expected["eager"] = logits(model, INPUT_IDS)
        save_file({"input_ids": INPUT_IDS, **expected}, str(root / f"{name}.expected"))
    return root, forms


@pytest.fixture(scope="module")
def probed(saved):
    """Mode → what `checkpoint_probe.py` found."""
    root, _ = saved
    code, directories = PROBE.read_text(), [root / name for name in EVERY]
    results = {}
    for mode in MODES:
        done = run_fresh(code, mode, *directories, folder=root, timeout=240)
        assert done.returncode == 0, f"{mode}: {done.stderr[-3000:]}"
        results[mode] = json.loads(done.stdout.rpartition("RESULT ")[2])
    return results


@pytest.mark.parametrize("name", EVERY)
def test_the_form_of_a_checkpoint_and_its_files(name, saved):
    root, forms = saved
    form = "shim" if EVERY[name][1].startswith("Pruned") else "stock"
    assert forms[name] == form
    config = json.loads((root / name / "config.json").read_text())
    code = (root / name / "modeling_llmpruner.py").exists()
    assert ("llmpruner" in config) == ("auto_map" in config) == code == (form == "shim")
    assert {file.suffix for file in (root / name).iterdir()} <= {".json", ".safetensors", ".py"}
    record = json.loads((root / name / "llmpruner.json").read_text())
    assert record.keys() == {"name", "files"} and record["name"] == name


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EVERY)
def test_a_fresh_process_gives_the_same_outputs(name, mode, probed):
    found = probed[mode]["found"][name]
    assert found["class"] == EVERY[name][1]
    for way in ("default", "eager", "bfloat16", "saved again"):
        # The grouped matmul of experts rounds the last bit in bf16 differently from process to process.
        last_bit = way == "bfloat16" and name.startswith("mixtral")
        assert found[way] <= (2**-8 if last_bit else 1e-6), way
    assert found["headless"] <= 1e-6
    assert found["dynamic cache"] == found["static cache"] == 0
    assert ("modeling_llmpruner.py" in found["files"]) == found["class"].startswith("Pruned")
    tied = name == "gemma2" or (name in LLAMA and "tie_word_embeddings" in LLAMA[name].options)
    assert found["tied"] == tied


@pytest.mark.slow
def test_remote_code_needs_no_llmpruner(probed):
    assert probed["remote"]["modules"] == []
    assert "llmpruner.plugins.installed" in probed["registered"]["modules"]


NO_QUESTION = """
import sys
from transformers import AutoConfig, AutoTokenizer
for folder in sys.argv[1:]:
    print(AutoTokenizer.from_pretrained(folder)("the fox").input_ids, type(AutoConfig.from_pretrained(folder)).__name__)
"""


@pytest.mark.slow
def test_tokenizers_and_configurations_need_no_code_of_the_checkpoint(tmp_path):
    tokenizer, folders = tiny_models.tokenizer(), [tmp_path / name for name in ("mlp", "gqa", "depth-mlp", "all")]
    for folder in folders:
        save_checkpoint(cut_llama(folder.name), folder, record={}, tokenizer=tokenizer)
    done = run_fresh(NO_QUESTION, *folders, folder=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"{tokenizer('the fox').input_ids} LlamaConfig"] * 4


@pytest.mark.parametrize("name", ["mlp", "gqa", "query"])
def test_the_stock_class_refuses_a_shim(name, saved):
    """It would build layers of full width, and fill what is missing with random numbers."""
    from transformers import AutoModelForCausalLM

    with pytest.raises(RuntimeError, match=r"[Mm]ismatch"):
        AutoModelForCausalLM.from_pretrained(saved[0] / name)


def test_per_layer_config_states_what_it_can(saved):
    def stated(name):
        return json.loads((saved[0] / name / "config.json").read_text()).get("per_layer_config")

    assert stated("mlp") == {"0": {"intermediate_size": 40}, "2": {"intermediate_size": 17}}
    assert stated("gqa") == {"0": {"num_attention_heads": 2, "num_key_value_heads": 1}}
    assert stated("query") == {"0": {"num_attention_heads": 2}, "1": {"intermediate_size": 8}}
    assert stated("all") is None, "the hidden width is not a matter of one layer"
    assert stated("mlp-uniform") is None
