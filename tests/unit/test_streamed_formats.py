"""Other formats than safetensors, layer by layer: plan and weights are those of the model in memory, bit for bit."""

from __future__ import annotations

import gc
import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from criteria_cases import make
from llmpruner.models.computed_once import ComputedOnce
from llmpruner.models.torch_files import lazy_torch
from safetensors.torch import load_file, save_file
from test_streamed import METHODS, assert_same, prune
from transformers import AutoConfig, AutoModelForCausalLM

from llmpruner import api
from llmpruner.errors import CheckpointError, ModelError, OutputError, SettingsError
from llmpruner.models import gguf_tensors
from llmpruner.models.messages import quiet_gguf
from llmpruner.models.opening import open_streamed
from llmpruner.models.weights import lazy_checkpoint
from llmpruner.settings import LoadSettings, RunSettings

DATA = Path(__file__).parents[1] / "data"
H, KV, MLP, WORDS = 64, 32, 96, 64


def write_bin(name: str, folder: Path, shards: int = 2) -> Path:
    """A model of `CASES` in ``shards`` ``.bin`` files."""
    model = make(name).model
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"pytorch_model-{n + 1:05}-of-{shards:05}.bin" for n in range(shards)]
    places = {tensor: files[n % shards] for n, tensor in enumerate(state)}
    for file in files:
        torch.save({tensor: state[tensor] for tensor, place in places.items() if place == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


LAYER = {
    **{f"attn_{name}": (H, H) for name in ("q", "output")},
    **{f"attn_{name}": (KV, H) for name in ("k", "v")},
    **{f"{name}_norm": (H,) for name in ("attn", "ffn")},
    **{f"ffn_{name}": (MLP, H) for name in ("gate", "up")},
    "ffn_down": (H, MLP),
}
EXPERTS, WIDTH = 4, 768
MOE = {
    **{name: shape for name, shape in LAYER.items() if not name.startswith("ffn_") or name == "ffn_norm"},
    **{f"attn_{name}_norm": (16,) for name in "qk"},
    "ffn_gate_inp": (EXPERTS, H),
    **{f"ffn_{name}_exps": (EXPERTS, WIDTH, H) for name in ("gate", "up")},
    "ffn_down_exps": (EXPERTS, H, WIDTH),
}
CONVOLUTION = {
    **{name: shape for name, shape in LAYER.items() if not name.startswith("attn_") or name == "attn_norm"},
    "shortconv.conv": (H, 3),
    "shortconv.in_proj": (3 * H, H),
    "shortconv.out_proj": (H, H),
}


def write_gguf(file: Path, architecture: str = "llama") -> Path:
    """Random weights, matrices in blocks of 8-bit integers."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(H)
    writer.add_feed_forward_length(WIDTH if architecture == "qwen3moe" else MLP)
    writer.add_head_count(4)
    writer.add_head_count_kv([0, 2] if architecture == "lfm2" else 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(WORDS)
    layers = [LAYER, LAYER]
    shapes = {"token_embd": (WORDS, H), "output_norm": (H,)}
    if architecture == "qwen3moe":
        writer.add_key_length(16)
        writer.add_value_length(16)
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
        layers = [MOE, MOE]
    if architecture == "lfm2":
        writer.add_shortconv_l_cache(3)
        layers = [CONVOLUTION, {**LAYER, **{f"attn_{name}_norm": (16,) for name in "qk"}}]
        shapes = {"token_embd": (WORDS, H), "token_embd_norm": (H,)}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a", "b", "ab", *(f"<{n}>" for n in range(5, WORDS))])
    writer.add_token_types([1] * WORDS)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    torch.manual_seed(0)
    shapes |= {f"blk.{n}.{name}": shape for n, layer in enumerate(layers) for name, shape in layer.items()}
    blocks = gguf.GGMLQuantizationType.Q8_0
    for name, shape in shapes.items():
        values = torch.randn(shape).numpy()
        if shape[-1] % 32 == 0 and len(shape) > 1:
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, blocks), raw_dtype=blocks)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def written(name: str, folder: Path) -> Path:
    """The model ``name`` of `FORMATS`."""
    kind, _, what = name.partition(" ")
    if kind == "bin":
        return write_bin(what, folder)
    if kind == "gguf":
        folder.mkdir()
        return write_gguf(folder / "tiny.gguf")
    return Path(shutil.copytree(DATA / what, folder))


WEIGHTS = {"importance": "l1", "compensate": "none"}
FORMATS = {
    "bin llama-gqa": {**METHODS["best"], "calibration": "self"},
    "bin mixtral": {**WEIGHTS, "kinds": "mlp,expert"},
    "gguf llama": {**METHODS["best"], "calibration": "self", "shape": "free"},
    "plugin meta_llama/gqa/2shards": {**METHODS["taylor"], "calibration": "self"},
    "plugin chatglm2": {**WEIGHTS, "kinds": "mlp,attention"},
    "plugin chatglm_v1": {**WEIGHTS, "kinds": "mlp,attention"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_the_result_is_that_of_a_model_in_memory(name, tmp_path, monkeypatch):
    """With products in bfloat16, as on a processor that is faster so; `test_streamed` has those in full precision."""
    monkeypatch.setattr("llmpruner.models.numbers.multiplies_bfloat16_fast", lambda device: device == "cpu")
    model = written(name, tmp_path / "dense")
    settings = {"kinds": "mlp", "layers": "all", **FORMATS[name]}
    resident = prune(model, tmp_path / "resident", streamed=False, **settings)
    streamed = prune(model, tmp_path / "streamed", streamed=True, **settings)
    assert resident.streamed is None and streamed.streamed is not None
    assert_same(tmp_path / "resident", tmp_path / "streamed")
    for file in ("config.json", "generation_config.json"):
        ours, theirs = ((tmp_path / one / file).read_text() for one in ("resident", "streamed"))
        assert ours == theirs


@pytest.mark.parametrize("architecture", ["qwen3moe", "lfm2"])
def test_a_gguf_file_is_dequantised_as_by_transformers(architecture, tmp_path):
    """Experts that are fused in the model, and an architecture that transformers reads by conversions alone."""
    from llmpruner.models.gguf_tensors import lazy_gguf

    file = write_gguf(tmp_path / "tiny.gguf", architecture)
    with quiet_gguf():
        config = AutoConfig.from_pretrained(tmp_path, gguf_file=file.name)
        whole = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.bfloat16)
        lazy = lazy_gguf(file, config, torch.bfloat16, "model.layers")
    expected = dict(whole.named_parameters())
    for part in (None, 1, 0):
        for name, tensor in lazy.read(part).items():
            value = expected.pop(name)
            assert torch.equal(tensor, value) and tensor.stride() == value.stride() and tensor.dtype == torch.bfloat16
    assert not expected and lazy.info is not None and not any(lazy.info.values())


@pytest.mark.parametrize("room", [1 << 40, 0])
def test_weights_are_dequantised_once(room, tmp_path, monkeypatch):
    """Where there is room on the disk: text that the model writes takes a pass over them for every token."""
    calls, own = Counter(), gguf_tensors.dequantised

    def dequantised(file, place):
        calls[place.offset] += 1
        return own(file, place)

    monkeypatch.setattr(gguf_tensors, "dequantised", dequantised)
    monkeypatch.setattr("llmpruner.recipes.pruning.disk_usage", lambda _: SimpleNamespace(free=room))
    model = written("gguf llama", tmp_path / "dense")
    prune(model, tmp_path / "out", streamed=True, shape="free", calibration="self", **METHODS["best"])
    tensors = 2 * len(LAYER) + 2
    assert len(calls) == tensors and (min(calls.values()) > 3 if room == 0 else set(calls.values()) == {1})
    gc.collect()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]


class Counted:
    """Values that are kept in the order of their transposed axes, as transformers gives some of them."""

    def __init__(self):
        self.calls = []

    def read(self, names):
        self.calls.append(sorted(names))
        return {name: torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1) for name in names}


def test_values_that_were_computed_are_kept(tmp_path):
    source = Counted()
    kept = ComputedOnce(source, tmp_path)
    (expected,) = Counted().read(["a"]).values()
    for _ in range(3):
        for names in (["a", "b"], ["c"]):
            for value in kept.read(names).values():
                assert torch.equal(value, expected) and value.stride() == expected.stride()
                value.zero_()  # does not reach the file
    assert source.calls == [["a", "b"], ["c"]]
    assert len(list(tmp_path.glob(".llmpruner-converted-*/*.safetensors"))) == 2
    del kept
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_values_that_cannot_be_kept(tmp_path):
    kept = ComputedOnce(Counted(), tmp_path)
    shutil.rmtree(next(tmp_path.iterdir()))
    with pytest.raises(OutputError, match="cannot be written"):
        kept.read(["a"])


@pytest.mark.parametrize("name", ["bin llama-gqa", "gguf llama", "plugin meta_llama/gqa/2shards", "plugin chatglm2"])
def test_files_are_let_go_of(name, tmp_path, catalog):
    """Pages of mapped files count as memory of the process."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("needs Linux")
    folder = written(name, tmp_path / "dense").parent / ("" if name.startswith("gguf") else "dense")
    source = folder / "tiny.gguf" if name.startswith("gguf") else folder
    structure = api.discover(str(source), catalog=catalog)
    model = open_streamed(str(source), catalog, LoadSettings(dtype="float32"), structure, ahead=False)
    for number in (0, 1):
        with model.weights.layer(number):
            values = [parameter.clone() for name, parameter in model.model.named_parameters() if not parameter.is_meta]
        assert values and str(folder) not in maps.read_text()


def refusal(model: Path, tmp_path: Path) -> str:
    with pytest.raises(SettingsError, match="--max-memory 1,000 bytes") as caught:
        api.prune(str(model), output=tmp_path / "out", run=RunSettings(max_memory=1000), ratio=0.2, **WEIGHTS)
    return str(caught.value)


def test_files_of_old_torch_are_refused(tmp_path):
    model = write_bin("llama-gqa", tmp_path / "dense", 1)
    (file,) = model.glob("*.bin")
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    assert "cannot be read layer by layer: its .bin files were written before PyTorch 1.6" in refusal(model, tmp_path)


def test_a_reader_of_whole_models_is_refused(tmp_path):
    from llmpruner_llama import MetaReader

    model = Path(shutil.copytree(DATA / "meta_llama/gqa/2shards", tmp_path / "dense"))
    assert "read layer by layer" not in refusal(model, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(MetaReader, "open_model")
        assert "read layer by layer: the reader 'meta-llama' takes it as a whole" in refusal(model, tmp_path)


def test_damage_is_named_before_anything_is_pruned(tmp_path, catalog):
    model = write_bin("llama-gqa", tmp_path / "dense", 1)
    (file,) = model.glob("*.bin")
    state = torch.load(file, weights_only=True)
    norm = next(name for name in state if name.endswith("layers.1.post_attention_layernorm.weight"))
    torch.save({name: tensor for name, tensor in state.items() if name != norm}, file)
    structure = api.discover(str(model), catalog=catalog)
    with pytest.raises(ModelError, match=f"lacks tensor '{norm}'"):
        open_streamed(str(model), catalog, LoadSettings(), structure)
    torch.save({**state, norm: torch.zeros(3)}, file)
    with pytest.raises(ModelError, match=f"has in another shape .* '{norm}'"):
        open_streamed(str(model), catalog, LoadSettings(), structure)


def test_tied_parameters_that_safetensors_hold_twice(tmp_path):
    model = make("gpt2").model
    model.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    lazy = lazy_checkpoint(tmp_path, torch.float32, "transformer.h").model
    assert lazy.lm_head.weight is lazy.transformer.wte.weight
    state["lm_head.weight"][0] += 1
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="differ, but the configuration ties them"):
        lazy_checkpoint(tmp_path, torch.float32, "transformer.h")


def test_tied_parameters_with_different_values_are_refused(tmp_path):
    model = make("gpt2").model
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert lazy_torch(tmp_path, torch.float32, "transformer.h").read(None).keys() == {
        name for name, _ in model.named_parameters() if ".h." not in name
    }
    state["lm_head.weight"][0] += 1
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="differ, but the configuration ties them"):
        lazy_torch(tmp_path, torch.float32, "transformer.h")
