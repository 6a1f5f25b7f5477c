"""A GGUF file, written here tensor by tensor, becomes a plain model without a word on the terminal."""

import os

import gguf
import pytest
import torch
from said import Said

import llmpruner
from llmpruner.discovery.opening import Opener
from llmpruner.models import gguf as parsing
from llmpruner.models.opening import load_model

HIDDEN, INNER, HEADS, WORDS = 32, 48, 4, 64


def written(tmp_path, *, nearly_tied=False):
    file = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    values = {
        "block_count": 2, "context_length": 64, "embedding_length": HIDDEN, "feed_forward_length": INNER,
        "head_count": HEADS, "head_count_kv": HEADS, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 10000.0,
        "vocab_size": WORDS, "tokenizer_model": "gpt2", "tokenizer_pre": "smollm",
        "token_list": ["<s>", "</s>", "a", "b", "ab", *(f"<{n}>" for n in range(5, WORDS))],
        "token_types": [1] * WORDS, "token_merges": ["a b"], "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    for name, value in values.items():
        getattr(writer, f"add_{name}")(value)
    torch.manual_seed(0)
    shapes = {"token_embd": (WORDS, HIDDEN), "output": (WORDS, HIDDEN), "output_norm": (HIDDEN,)}
    for n in range(2):
        shapes |= {f"blk.{n}.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{n}.{name}_norm": (HIDDEN,) for name in ("attn", "ffn")}
        shapes |= {f"blk.{n}.ffn_{name}": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[f"blk.{n}.ffn_down"] = (HIDDEN, INNER)
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    if nearly_tied:
        tensors["output"] = tensors["token_embd"] + 0.02 * tensors["output"]
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_it_loads_quietly_and_whole(tmp_path, catalog, capfd):
    file = written(tmp_path)
    capfd.readouterr()
    loaded = load_model(Opener(catalog).structure(file))
    assert capfd.readouterr() == ("", "")
    assert (loaded.family.name, loaded.graph.num_layers, loaded.tokenizer.decode([4])) == ("llama", 2, "ab")
    assert loaded.tokenizer.init_kwargs["gguf_pre"] == "smollm"
    torch.manual_seed(0)
    torch.testing.assert_close(loaded.network.get_input_embeddings().weight.data, torch.randn(WORDS, HIDDEN))


def test_a_file_is_parsed_once_and_freed_and_again_when_it_changed(tmp_path, monkeypatch):
    file, calls, own = written(tmp_path), [], gguf.GGUFReader.__init__
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda *given: calls.append(given) or own(*given))
    llmpruner.prune(file, output=tmp_path / "out", ratio=0.2, importance="l2", compensate="none")
    assert len(calls) == 1
    assert llmpruner.discover(file).graph.num_layers == 2 and parsing._parsed.cache_info().currsize == 0
    first = parsing.gguf_reader(file)
    os.utime(file, ns=(0, 0))
    assert parsing.gguf_reader(file) is not first
    parsing.forget_gguf()


def test_an_embedding_that_is_stored_twice_is_read_once(tmp_path):
    file, progress = written(tmp_path, nearly_tied=True), Said()
    structure = llmpruner.discover(file, progress=progress)
    assert structure.graph.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "twice, quantised apart (difference 1.9%); it is read as one matrix" in " ".join(progress.lines)
    network = llmpruner.load(file).network
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    assert network.lm_head.weight is network.model.embed_tokens.weight
    torch.testing.assert_close(network.lm_head.weight.data, torch.from_numpy(stored["output.weight"].copy()))
    llmpruner.export(file, output=tmp_path / "stock", to="stock")
    assert llmpruner.discover(tmp_path / "stock").config.tie_word_embeddings
    assert not llmpruner.discover(written(tmp_path)).graph.ties, "another matrix"


@pytest.mark.parametrize("size", [-100, 1000])
def test_a_file_that_ends_too_early_is_named(size, tmp_path):
    file = written(tmp_path)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(llmpruner.CheckpointError, match=r"tiny\.gguf is truncated; download"):
        llmpruner.discover(file)
