"""Writing a model in Meta's official format, as far as the format can represent it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmpruner import CheckpointError, UnsupportedModelError

from .meta_format import PARAMS, MetaFolder, MetaParams, Placement, placements, to_neighbours, tokenizer_in
from .meta_tokenizer import TOKENIZER, tiktoken_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REFUSED = "Meta's format cannot hold this model"


def write_meta(model: PreTrainedModel, tokenizer: Path | None, directory: Path, shards: int = 1) -> MetaParams:
    """Write ``model`` into ``directory`` as ``params.json`` and ``shards`` files ``consolidated.NN.pth``.
    ``tokenizer``: the ``tokenizer.model`` to copy, if any. Raises `UnsupportedModelError` when the format can't
    represent the model."""
    state = model.state_dict()
    params = MetaParams.of(model.config, width=_check(model, state), vocabulary=len(state["model.embed_tokens.weight"]))
    if params.n_kv_heads % shards or params.vocab_size % shards or params.ffn_width % shards:
        raise UnsupportedModelError(
            f"{_REFUSED} in {shards} shards: {params.n_kv_heads} KV heads, {params.vocab_size} tokens and an "
            f"MLP of width {params.ffn_width} must all divide by the number of shards"
        )
    # Llama 3 and later are known by their rotary settings or their tokenizer; Code Llama has a base of 1e6.
    llama_3 = params.rope_scaling_factor is not None or params.rope_theta == 500000.0
    axis = 0 if llama_3 or (tokenizer is not None and tiktoken_ranks(tokenizer)) else 1
    for number in range(shards):
        # Meta's format has no tied embeddings.
        parts = {
            placement.meta: _part(state[placement.name], placement, number, shards)
            for placement in placements(params, tied=False, embedding_axis=axis)
        }
        torch.save(parts, directory / f"consolidated.{number:02}.pth")
    (directory / PARAMS).write_text(json.dumps(params.to_json()) + "\n")
    if tokenizer is not None:
        shutil.copyfile(tokenizer, directory / TOKENIZER)
    return params


def check_written(directory: Path, model: PreTrainedModel) -> None:
    """Read ``directory`` back and compare it with ``model``: the sizes and rotary settings of the configuration, and
    every tensor bit by bit. Raises `CheckpointError` for the first difference."""
    folder, state = MetaFolder(directory), model.state_dict()
    # `tokenizer_in` also searches the parent of ``directory``.
    again = folder.config(tokenizer_in(directory) if (directory / TOKENIZER).is_file() else None)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    for field in (*sizes, "rms_norm_eps", "rope_parameters"):
        ours, theirs = getattr(again, field), getattr(model.config, field)
        if ours != theirs:
            raise CheckpointError(f"Meta's format does not keep {field}: it was {theirs}, and is read back as {ours}")
    for name, tensor in folder.state(None).items():
        if not torch.equal(tensor, state[name].cpu()):
            raise CheckpointError(f"{name} is read back with other values than were written: check disk and memory")


def _part(tensor: torch.Tensor, placement: Placement, number: int, shards: int) -> torch.Tensor:
    if placement.heads:
        tensor = to_neighbours(tensor, placement.heads)
    if placement.axis is not None:
        tensor = tensor.chunk(shards, placement.axis)[number]
    # torch.save would write the whole storage of a view.
    return tensor.cpu().contiguous().clone()


def _check(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> int:
    """The width of all MLPs. Raises `UnsupportedModelError` for models that Meta's code can't build."""
    config = model.config
    hidden, heads = config.hidden_size, config.num_attention_heads
    if config.model_type not in ("llama", "mistral") or config.hidden_act != "silu":
        raise UnsupportedModelError(f"{_REFUSED}: it holds LLaMA, and the model_type is '{config.model_type}'")
    if getattr(config, "sliding_window", None):
        raise UnsupportedModelError(f"{_REFUSED}: its attention has a sliding window")
    left = state["model.embed_tokens.weight"].shape[1]
    if left != hidden:
        raise UnsupportedModelError(
            f"{_REFUSED}: hidden channels were pruned ({left} of {hidden} are left), and there head_dim is "
            "dim / n_heads; prune MLP channels or layers instead"
        )
    biased = next((name for name in state if name.endswith(".bias")), None)
    if biased is not None:
        raise UnsupportedModelError(f"{_REFUSED}: it has biases ({biased})")
    widths = set()
    for number, layer in enumerate(model.model.layers):
        widths.add(len(layer.mlp.gate_proj.weight))
        for m, count in (("q", heads), ("k", config.num_key_value_heads)):
            rows = len(state[f"model.layers.{number}.self_attn.{m}_proj.weight"])
            if hidden % heads or rows != count * (hidden // heads):
                raise UnsupportedModelError(
                    f"{_REFUSED}: heads were pruned (layer {number}: {rows} rows in {m}_proj), and there head_dim "
                    "is dim / n_heads in every layer; prune MLP channels or layers instead"
                )
    if len(widths) != 1:
        raise UnsupportedModelError(
            f"{_REFUSED}: there all MLPs have the same width, here they have {min(widths)} to {max(widths)}; prune "
            "every MLP by the same share (--set prune.unit_ratio=…, prune.layers=all), or whole layers (--kinds layer)"
        )
    return widths.pop()
