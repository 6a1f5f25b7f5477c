"""A GGUF file gives the model's logits: computed from the file alone, by transformers, and by llama.cpp."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import tiny_models
import torch
import transformers
from checkpoint_cases import cut_llama
from gguf_reference import GgufFile, gguf_logits
from llmpruner_gguf import GgufExporter
from llmpruner_gguf import export as steps
from llmpruner_gguf.bench import gguf_work
from llmpruner_gguf.export import relative_errors
from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel, Punctuation, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import llmpruner
from llmpruner import build_graph, save_checkpoint, work_of
from llmpruner.discovery.cut import cut
from llmpruner.discovery.oracle import logits
from llmpruner.errors import CheckpointError, ModelError, UnsupportedModelError
from llmpruner.exporters import export
from llmpruner.models.family import AutoFamily
from llmpruner.models.meta import graph_of
from llmpruner.models.numbers import widened
from llmpruner.values import bytes_text

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
BOTH_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
WINDOW = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24}

CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {}),
    "llama-biases": ("llama", "Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied-wide-heads": ("llama", "Llama", {"head_dim": 16, "tie_word_embeddings": True}),
    "llama-llama3": ("llama", "Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", "Llama", {"rope_parameters": LINEAR}),
    "llama-yarn": ("llama", "Llama", {"rope_parameters": YARN}),
    "llama-yarn-factor": ("llama", "Llama", {"rope_parameters": {**YARN, "attention_factor": 1.5}}),
    "mistral": ("llama", "Mistral", {"sliding_window": None}),
    "mixtral": ("llama", "Mixtral", {"num_local_experts": 4}),
    "qwen2": ("qwen2", "Qwen2", {}),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 16}),
    "qwen3-yarn": ("qwen3", "Qwen3", {"head_dim": 16, "rope_parameters": YARN}),
    "qwen3-moe": (
        "qwen3moe", "Qwen3Moe", {"head_dim": 8, "moe_intermediate_size": 32, **EXPERTS, "norm_topk_prob": True}
    ),
    "olmoe": ("olmoe", "Olmoe", {"num_key_value_heads": 4, **EXPERTS}),
    "gemma": ("gemma", "Gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", "Gemma2", WINDOW),
    "gemma2-one-layer": (
        "gemma2", "Gemma2", {"num_hidden_layers": 1, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
    ),
    "gemma3": (
        "gemma3", "Gemma3Text",
        {**WINDOW, "num_hidden_layers": 7, "rope_parameters": BOTH_ROPES, "final_logit_softcapping": 20.0},
    ),
}  # fmt: skip
"""Name → architecture in the file, class, and its configuration beside `SIZES`."""


def random_model(name: str) -> Any:
    return model_of(CONFIGS[name][1], **CONFIGS[name][2])


def model_of(name: str, **options: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**SIZES | copy.deepcopy(options))
    return randomised(transformers.AutoModelForCausalLM.from_config(config))


def randomised(model: Any, spread: float = 0.2) -> Any:
    """Weights large enough that a wrong order of channels changes logits as much as other weights would."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, spread)
    model.tie_weights()
    return model.eval()


def prompt(model: Any, length: int = 48) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(1))


BYTE_FALLBACK = Path(__file__).parents[2] / "data" / "vicuna" / "tokenizer" / "tokenizer.model"
HAS_RUNTIME = importlib.util.find_spec("llama_cpp") is not None
HOW = "verified by llama.cpp's logits" if HAS_RUNTIME else "read back; install llama-cpp-python"
needs_runtime = pytest.mark.skipif(not HAS_RUNTIME, reason="llama-cpp-python is not installed")

FREE = {
    "mlp": {"feed_forward_length": [40, 48, 17]},
    "gqa": {"attention.head_count_kv": [1, 2, 2], "attention.head_count": [2, 4, 4]},
    "mha": {"attention.head_count_kv": [4, 2, 3]},
    "query": {"attention.head_count": [2, 4, 4], "feed_forward_length": [48, 8, 48]},
    "all": {"embedding_length": 20, "attention.head_count_kv": [1, 2], "feed_forward_length": [48, 30]},
}
"""Cuts of a tiny LLaMA → what the file must state."""


def exported(model, folder, *, tokenizer=None, name="tiny", **settings):
    """The line, and the file that the export of ``model`` wrote."""
    source = folder / name
    save_checkpoint(model, source, record={}, tokenizer=tokenizer)
    loaded = SimpleNamespace(network=model, tokenizer=tokenizer, family=None, record={})
    line = export(source, GgufExporter(**settings), folder / "out", lambda: loaded)
    return line, folder / "out" / f"{name}.gguf"


def value(file, key):
    return gguf.GGUFReader(file).fields[key].contents()


def error_of(model, found):
    """The largest error of logits for the prompt, relative to those of ``model``."""
    return float(relative_errors(logits(model, prompt(model)[None])[0], found).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture(name, tmp_path):
    model = random_model(name)
    line, file = exported(model, tmp_path)
    assert line.startswith(f"tiny.gguf ({CONFIGS[name][0]}, f32, ") and HOW in line
    assert error_of(model, gguf_logits(file, prompt(model))) < 1e-4
    assert {path.name for path in file.parent.iterdir()} == {"tiny.gguf", "Modelfile"}
    assert (file.parent / "Modelfile").read_text() == "FROM ./tiny.gguf\n"
    assert value(file, "tokenizer.ggml.model") == "none", "the source has no tokenizer"


@pytest.mark.parametrize("name", FREE)
def test_different_sizes_per_layer(name, tmp_path):
    model = randomised(cut_llama(name))
    line, file = exported(model, tmp_path)
    assert "(deci, f32" in line and HOW in line
    assert error_of(model, gguf_logits(file, prompt(model))) < 1e-4
    for key, expected in FREE[name].items():
        assert value(file, f"deci.{key}") == expected
    assert value(file, "deci.attention.key_length") == value(file, "deci.rope.dimension_count") == 8


def without(name, kept):
    model = random_model(name)
    cut(model, build_graph(AutoFamily(), model.config), kept, AutoFamily())
    return model


@pytest.mark.parametrize(("name", "kind", "kept", "key"), [
    ("qwen2", "attention", [0], "attention.head_count_kv"),  # its heads do not fill the hidden size any more
    ("mixtral", "experts", [0, 2, 3], "expert_count"),
])  # fmt: skip
def test_equal_cuts_that_llama_can_state(name, kind, kept, key, tmp_path):
    model = without(name, {f"layers.{layer}.{kind}": kept for layer in range(3)})
    line, file = exported(model, tmp_path)
    assert "(llama, f32" in line and value(file, f"llama.{key}") == len(kept)
    assert error_of(model, gguf_logits(file, prompt(model))) < 1e-4


@pytest.mark.parametrize(("name", "share"), [("mixtral", 2 / 4), ("qwen3-moe", 2 / 6), ("olmoe", 2 / 6)])
def test_work_in_llama_cpp_is_that_of_the_experts_that_a_token_uses(name, share, tmp_path):
    model = random_model(name)
    _, file = exported(model, tmp_path)
    (ours, _), theirs = gguf_work(file), work_of(model, graph_of(model, ()))
    assert (ours.body_macs, ours.head_macs) == (theirs.body_macs, theirs.head_macs)
    assert ours.weight_bytes == theirs.weight_bytes and ours.routed_bytes == theirs.routed_bytes
    assert list(ours.routed_bytes) == [share]


@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "bf16"), (torch.float16, "f16"), (torch.float32, "f32")])
def test_the_type_is_that_of_the_checkpoint(dtype, kind, tmp_path):
    line, file = exported(random_model("qwen3-moe").to(dtype), tmp_path)
    types = {name: found.name for name, found in GgufFile(file).types.items()}
    assert f", {kind}, " in line
    assert types["blk.1.attn_q.weight"] == types["blk.0.ffn_up_exps.weight"] == kind.upper()
    assert types["blk.0.attn_norm.weight"] == types["blk.0.ffn_gate_inp.weight"] == "F32"


def test_values_too_large_for_float16_are_refused(tmp_path):
    model = random_model("llama")
    model.lm_head.weight.data[3, 5] = 1e6
    with pytest.raises(UnsupportedModelError, match=r"output\.weight has values that are too large for float16.*f32"):
        exported(model, tmp_path, type="f16")
    assert not (tmp_path / "out").exists()


def _with(name, **options):
    return lambda: model_of(name, **options)


def _other_epsilon():
    model = random_model("llama")
    model.model.norm.variance_epsilon = 1e-3
    return model


def _other_embedding_scale():
    model = random_model("gemma")
    model.model.embed_tokens.scalar_embed_scale = 3.0
    return model


WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
REFUSED = {
    "another type": (_with("GPT2"), "does not write models of type 'gpt2'; it writes llama, mistral"),
    "widths of qwen3": (lambda: without("qwen3", {"layers.1.mlp": range(20)}), "different numbers of channels"),
    "norms": (_other_epsilon, r"different norm epsilons \(1e-06, 0.001\)"),
    "dynamic rope": (
        _with("Llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "cannot state rotary scaling 'dynamic'",
    ),
    "llama3 rope of qwen3": (_with("Qwen3", rope_parameters=LLAMA3), "cannot state rotary scaling 'llama3'"),
    "yarn's bounds": (_with("Llama", rope_parameters={**YARN, "beta_fast": 16.0}), "beta_fast 32"),
    "activation": (_with("Llama", hidden_act="gelu"), "its activation is silu, not gelu"),
    "weights of experts": (_with("Qwen3Moe", **EXPERTS, norm_topk_prob=False), "norm_topk_prob must be True"),
    "ordinary layers among experts": (
        _with("Qwen3Moe", **EXPERTS, norm_topk_prob=True, mlp_only_layers=[1]),
        r"model\.layers\.1\.mlp\.gate_proj\.weight: GGUF's architecture 'qwen3moe' has no such tensor",
    ),
    "caps": (_with("Gemma2", head_dim=16, attn_logit_softcapping=None), "it always caps attention logits"),
    "output bias of attention": (_with("Qwen3", attention_bias=True), r"no bias 'blk\.0\.attn_output\.bias'"),
    # As after the removal of layers: llama.cpp derives which layers have a window from their numbers alone.
    "windows of gemma3": (
        _with("Gemma3Text", **CONFIGS["gemma3"][2] | {"num_hidden_layers": 3, "layer_types": WINDOWS}),
        "all layers but each 6th a sliding window, which layer 1 of the model does not fit; .* 6 layers in a row$",
    ),
    "scale of embeddings": (_other_embedding_scale, "multiplies embeddings by 5.65685, the model by 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_gguf_cannot_state_is_refused(case, tmp_path):
    make, message = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        exported(make(), tmp_path)
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["tiny"]


MISTAKES = {
    "rotary order": ("llama", "interleaved", lambda tensor, heads: tensor),
    "rotary scaling": (
        "qwen3-yarn", "_add_rope", lambda writer, facts: writer.add_rope_freq_base(facts.rope["rope_theta"])
    ),
    "rotary factors": ("llama-llama3", "_rope_factors", lambda model, facts: torch.ones(4)),
    "base of sliding layers": ("gemma3", "_add_rope", lambda writer, facts: writer.add_rope_freq_base(1e6)),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_reference_notices_a_wrong_file(mistake, tmp_path, monkeypatch):
    name, function, wrong = MISTAKES[mistake]
    monkeypatch.setattr(steps, function, wrong)
    monkeypatch.setattr(steps, "find_spec", lambda name: None)
    model = random_model(name)
    _, file = exported(model, tmp_path)
    assert error_of(model, gguf_logits(file, prompt(model))) > 1e-2


def byte_level_model():
    """With more rows of the embedding than the tokenizer has tokens."""
    return model_of("Llama", vocab_size=310, eos_token_id=1)


def test_a_byte_level_tokenizer(tmp_path):
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    _, file = exported(byte_level_model(), tmp_path, tokenizer=tokenizer)
    assert (value(file, "tokenizer.ggml.model"), value(file, "tokenizer.ggml.pre")) == ("gpt2", "gpt-2")
    assert value(file, "tokenizer.chat_template") == tokenizer.chat_template
    assert (value(file, "tokenizer.ggml.bos_token_id"), value(file, "tokenizer.ggml.eos_token_id")) == (0, 1)
    assert value(file, "tokenizer.ggml.add_bos_token") is False
    tokens, types = value(file, "tokenizer.ggml.tokens"), value(file, "tokenizer.ggml.token_type")
    vocabulary = tokenizer.get_vocab()
    assert len(tokens) == 310 and types[0] == gguf.TokenType.CONTROL
    think = vocabulary["<think>"]
    assert tokens[think] == "<think>" and types[think] == gguf.TokenType.USER_DEFINED
    assert tokens[think + 1] == f"[PAD{think + 1}]" and types[think + 1] == gguf.TokenType.UNUSED
    assert (file.parent / "Modelfile").read_text() == 'FROM ./tiny.gguf\nPARAMETER stop "</s>"\n'
    again = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert again(tiny_models.TEXT)["input_ids"] == tokenizer(tiny_models.TEXT)["input_ids"]


def test_the_pre_tokenizer_of_the_dense_models_file_is_kept(tmp_path):
    tokenizer = tiny_models.tokenizer()
    tokenizer.init_kwargs["gguf_pre"] = "smollm"
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    _, file = exported(byte_level_model(), tmp_path, tokenizer=again)
    assert value(file, "tokenizer.ggml.pre") == "smollm"


def test_a_byte_level_tokenizer_without_merges_is_refused_before_writing(tmp_path, capfd):
    letters = ByteLevelBPETokenizer()
    letters.train_from_iterator([], vocab_size=258, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters._tokenizer, bos_token="<s>", eos_token="</s>")
    with pytest.raises(UnsupportedModelError, match=r"byte-level tokenizer has no merges"):
        exported(byte_level_model(), tmp_path, tokenizer=tokenizer)
    assert not list(tmp_path.rglob("*.gguf")) and capfd.readouterr() == ("", "")


def test_an_unknown_pre_tokenizer_is_refused_unless_named(tmp_path):
    tokenizer = tiny_models.tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Punctuation(), ByteLevel(add_prefix_space=False)])
    with pytest.raises(UnsupportedModelError, match=r"unknown pre-tokenizer.* --set gguf\.pre=NAME"):
        exported(byte_level_model(), tmp_path, tokenizer=tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    _, file = exported(byte_level_model(), tmp_path, tokenizer=tokenizer, name="named", pre="olmo")
    assert value(file, "tokenizer.ggml.pre") == "olmo"


@needs_runtime
def test_a_wrong_name_of_the_pre_tokenizer_is_found(tmp_path):
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    base.decoder = decoders.ByteLevel()
    alphabet = ByteLevel.alphabet()
    base.train_from_iterator([tiny_models.TEXT], trainers.BpeTrainer(vocab_size=310, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base)
    with pytest.raises(CheckpointError, match=r"llama\.cpp splits text into other tokens .*--set gguf\.pre"):
        exported(byte_level_model(), tmp_path, tokenizer=tokenizer, pre="gpt-2")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_sentencepiece_tokenizer(tmp_path):
    (tmp_path / "spm").mkdir()
    shutil.copyfile(BYTE_FALLBACK, tmp_path / "spm" / "tokenizer.model")
    (tmp_path / "spm" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "spm")
    model = model_of("Llama", vocab_size=len(tokenizer) + 8)
    _, file = exported(model, tmp_path, tokenizer=tokenizer)
    assert value(file, "tokenizer.ggml.model") == "llama"
    types = value(file, "tokenizer.ggml.token_type")
    assert types[0] == gguf.TokenType.UNKNOWN and types[1] == gguf.TokenType.CONTROL and gguf.TokenType.BYTE in types
    again = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in ("Hello world", "two  blanks", "Übersetze 12345 你好"):
        ids, expected = (each(text, add_special_tokens=False)["input_ids"] for each in (again, tokenizer))
        assert ids == expected


@pytest.mark.parametrize(("quant", "error"), [("Q8_0", 0.05), ("q5_1", 0.25), ("q4_0", 0.7)])
def test_quantised_by_the_package_gguf(quant, error, tmp_path):
    model = randomised(model_of("Llama", hidden_size=256, intermediate_size=320, vocab_size=300), 0.05)
    line, file = exported(model, tmp_path, tokenizer=tiny_models.tokenizer(), quant=quant)
    types = {name: kind.name for name, kind in GgufFile(file).types.items()}
    kind = quant.upper()
    assert types["blk.0.ffn_down.weight"] == types["blk.0.attn_q.weight"] == kind
    assert types["token_embd.weight"] == types["output.weight"] == "Q8_0" and types["output_norm.weight"] == "F32"
    assert HOW in line and f"(llama, {quant.lower()}: " in line and "bits per weight" in line
    assert value(file, "general.file_type") == gguf.LlamaFileType[f"MOSTLY_{kind}"]
    larger = widened(llmpruner.discover(file), llmpruner.LoadSettings(dtype="float32"))
    size = bytes_text(4 * sum(parameter.numel() for parameter in model.parameters()))
    assert f"in memory and once saved {size} of float32; quantise the result by export" in larger
    assert error / 20 < error_of(model, gguf_logits(file, prompt(model))) < error


def test_rows_that_hold_no_whole_block_stay_float16(tmp_path, caplog):
    line, file = exported(model_of("Llama", intermediate_size=40), tmp_path, quant="q4_0")
    assert GgufFile(file).types["blk.0.ffn_down.weight"] == gguf.GGMLQuantizationType.F16
    assert "3 f16" in line and not caplog.text, "most rows have 32 or 64 weights"


def test_most_rows_without_whole_blocks_are_warned_of(tmp_path, caplog):
    exported(model_of("Llama", hidden_size=48, intermediate_size=40), tmp_path, quant="q4_0")
    assert "have rows of 40 and 48 weights, no multiples of 32, and get types of more bits than q4_0" in caplog.text


@needs_runtime
def test_quantised_by_llama_cpp(tmp_path, caplog):
    model = randomised(model_of("Llama", hidden_size=256, intermediate_size=320, vocab_size=300), 0.05)
    line, file = exported(model, tmp_path, tokenizer=tiny_models.tokenizer(), quant="q4_k_m")
    types = {name: kind.name for name, kind in GgufFile(file).types.items()}
    # Rows of 320 do not fill the blocks of 256.
    assert types["blk.0.attn_q.weight"] == "Q4_K" and types["blk.0.ffn_down.weight"] in ("Q5_0", "Q8_0")
    assert HOW in line and "q4_k_m: " in line and not caplog.text


def test_a_gguf_file_becomes_a_stock_checkpoint(tmp_path):
    model, tokenizer = byte_level_model(), tiny_models.tokenizer()
    _, file = exported(model, tmp_path, tokenizer=tokenizer)
    line = llmpruner.export(file, to="stock", output=tmp_path / "stock")
    assert line.startswith("LlamaForCausalLM of transformers loads it")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    assert error_of(model, logits(again, prompt(model)[None])[0]) < 1e-4
    read = AutoTokenizer.from_pretrained(tmp_path / "stock")
    assert read(tiny_models.TEXT)["input_ids"] == tokenizer(tiny_models.TEXT)["input_ids"]
    llmpruner.export(file, to="gguf", output=tmp_path / "gguf")
    assert error_of(model, gguf_logits(tmp_path / "gguf" / file.name, prompt(model))) < 1e-4
    with pytest.raises(ModelError, match=r"none\.gguf' does not exist"):
        llmpruner.export(tmp_path / "none.gguf", to="stock", output=tmp_path / "none")
