from __future__ import annotations

import json
import re

from llmpruner import CheckpointError, CheckpointReader


class HeronReader(CheckpointReader):
    """A folder with ``heron.json`` (sizes), ``heron.npz`` (plain arrays) and ``tokenizer.json``."""

    name = "heron"
    summary = "Heron's own format: heron.json, heron.npz and tokenizer.json"
    family = "heron"

    def recognises(self, path):
        return (path / "heron.json").is_file() and (path / "heron.npz").is_file()

    def read_config(self, path):
        from .modeling_heron import HeronConfig

        sizes = json.loads((path / "heron.json").read_text(encoding="utf-8"))
        return HeronConfig(
            vocab_size=sizes["vocabulary"],
            hidden_size=sizes["width"],
            inner_size=sizes["inner"],
            num_hidden_layers=sizes["depth"],
            num_attention_heads=sizes["heads"],
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )

    def read_model(self, path, dtype):
        import numpy
        import torch

        from .modeling_heron import HeronForCausalLM

        model = HeronForCausalLM(self.read_config(path))
        with numpy.load(path / "heron.npz", allow_pickle=False) as arrays, torch.no_grad():
            for name, parameter in model.named_parameters():
                stored = stored_name(name)
                if stored not in arrays or arrays[stored].shape != tuple(parameter.shape):
                    raise CheckpointError(
                        f"{path / 'heron.npz'} has no array '{stored}' of shape {tuple(parameter.shape)}; "
                        "the file is incomplete, or heron.json belongs to another one"
                    )
                parameter.copy_(torch.from_numpy(arrays[stored]))
        return model.to(dtype or torch.float32)

    def read_tokenizer(self, path):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_file=str(path / "tokenizer.json"), bos_token="<s>", eos_token="</s>", pad_token="</s>"
        )


def stored_name(parameter):
    """``blocks.3.attention.qkv.weight`` is stored as ``3.qkv``, its bias as ``3.qkv.bias``."""
    return re.sub(r"^blocks\.|attention\.|\.weight$", "", parameter)
