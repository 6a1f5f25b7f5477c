"""Writing a model in Meta's official format, as far as the format can represent it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import AutoConfig

from llmpruner import CheckpointError, UnsupportedModelError, new_directory

from .meta_files import PARAMS, TOKENIZER
from .meta_format import Placement, placements, to_neighbours
from .meta_params import META_FACTOR, MetaParams
from .meta_tokenizer import is_tiktoken
from .tensors import HuggingFaceTensors, ModelTensors, TensorSource, read_json

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_THETA_OF_LLAMA_3 = 500000.0
"""Code Llama has 1e6, and Llama 1 and 2 have 1e4."""
_REFUSED = "Meta's format cannot hold this model"
_EVENLY = "prune every MLP by the same share (--unit-ratio with --layers all), or whole layers (--kinds layer)"


def write_meta(model: PreTrainedModel, tokenizer: Any | None, target: Path, shards: int = 1) -> None:
    """Write ``model`` to ``target`` as ``params.json`` and ``shards`` files ``consolidated.NN.pth``.

    The format can represent MLPs of one pruned width and fewer layers, but not pruned attention. ``tokenizer``: one
    that was read from a folder with ``tokenizer.model``, the path of such a file, or None to write none. Raises
    `UnsupportedModelError` when the format cannot represent the model, `OutputError` when ``target`` exists.
    """
    file = None if tokenizer is None else _tokenizer_file(tokenizer)
    tensors = ModelTensors(model)
    params = meta_params(tensors, model.config, shards)
    with new_directory(target, empty=True) as stage:
        write_files(tensors, params, stage, shards, file)


def convert_to_meta(
    source: Path, target: Path, shards: int = 1, *, tokenizer: Path | Literal[True] | None = True
) -> list[str]:
    """Write the Hugging Face checkpoint in ``source`` to ``target`` in Meta's format; see `write_meta`. Returns
    `remarks`. One shard is in memory at a time.

    ``tokenizer``: the ``tokenizer.model`` to copy, True for the one in ``source``, None for none.
    """
    tensors, config = open_source(source)
    place = source / TOKENIZER if tokenizer is True else tokenizer
    file = None if place is None else _tokenizer_file(place)
    params = meta_params(tensors, config, shards)
    with new_directory(target, empty=True) as stage:
        write_files(tensors, params, stage, shards, file)
    return remarks(params, config)


def remarks(params: MetaParams, config: LlamaConfig) -> list[str]:
    """What the format, or Meta's code, does not keep of the model."""
    found = []
    factor, positions = params.rope_scaling_factor, config.max_position_embeddings
    if factor not in (None, META_FACTOR):
        found.append(f"its rotary factor is {factor:g}, and Meta's code takes {META_FACTOR:g}")
    # ``max_seq_len`` in params.json is a second value for an argument that Meta's code gives, which Python refuses.
    if positions != params.max_positions:
        found.append(f"its context of {positions} tokens is not stored, and is read back as {params.max_positions}")
    return found


def open_source(source: Path) -> tuple[HuggingFaceTensors, LlamaConfig]:
    """The weights and the configuration of a Hugging Face checkpoint. Raises `CheckpointError` for another directory,
    and `UnsupportedModelError` for a model that is not LLaMA."""
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source} is no Hugging Face checkpoint: it has no config.json")
    values = read_json(source / "config.json")
    if "llmpruner" in values:
        raise UnsupportedModelError(
            f"{_REFUSED}: it holds LLaMA whose layers all have one shape, and those of this one differ; {_EVENLY}"
        )
    if values.get("model_type") not in ("llama", "mistral"):
        raise UnsupportedModelError(
            f"{_REFUSED}: it holds LLaMA whose layers all have one shape, "
            f"and config.json has the model_type '{values.get('model_type')}'"
        )
    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    return HuggingFaceTensors(source), config


def meta_params(source: TensorSource, config: LlamaConfig, shards: int) -> MetaParams:
    """The content of ``params.json``. Raises `UnsupportedModelError` when the format cannot represent the model in
    ``shards`` files, `CheckpointError` when a tensor is missing."""
    if EMBEDDING not in source.specs:
        raise CheckpointError(f"the weights are incomplete: {EMBEDDING} is missing")
    width = _check(source, config)
    params = replace(MetaParams.of(config, width), vocab_size=source.specs[EMBEDDING].shape[0])
    if shards < 1 or params.n_kv_heads % shards or params.vocab_size % shards or params.ffn_width % shards:
        raise UnsupportedModelError(
            f"{_REFUSED} in {shards} shards: {params.n_kv_heads} KV heads, {params.vocab_size} tokens and an "
            f"MLP of width {params.ffn_width} must all divide by the number of shards"
        )
    for placement in placements(params, tied=stored_name(source, HEAD) == EMBEDDING):
        if placement.name not in source.specs:
            raise CheckpointError(f"the weights are incomplete: {placement.name} is missing")
    return params


def write_files(source: TensorSource, params: MetaParams, directory: Path, shards: int, tokenizer: Path | None) -> None:
    """Write all files of the format into ``directory``; ``tokenizer``: the file to copy, if any."""
    axis = _embedding_axis(params, tokenizer)
    for number in range(shards):
        state = {}
        for placement in placements(params, tied=False, embedding_axis=axis):
            state[placement.meta] = _part(source.read(stored_name(source, placement.name)), placement, number, shards)
        torch.save(state, directory / f"consolidated.{number:02}.pth")
    (directory / PARAMS).write_text(json.dumps(params.to_json()) + "\n")
    if tokenizer is not None:
        shutil.copyfile(tokenizer, directory / TOKENIZER)


def stored_name(source: TensorSource, name: str) -> str:
    """The name of the tensor ``name`` in ``source``: that of the embedding for a tied head, as Meta's format has no
    tied embeddings."""
    return EMBEDDING if name == HEAD and HEAD not in source.specs else name


def _embedding_axis(params: MetaParams, tokenizer: Path | None) -> int:
    """The axis of the embedding that the code of the model's release splits over shards: 0 for Llama 3 and later, which
    are known by their rotary settings or their tokenizer, else 1."""
    of_llama_3 = params.rope_scaling_factor is not None or params.rope_theta == _THETA_OF_LLAMA_3
    return 0 if of_llama_3 or (tokenizer is not None and is_tiktoken(tokenizer)) else 1


def _part(tensor: torch.Tensor, placement: Placement, number: int, shards: int) -> torch.Tensor:
    if placement.heads:
        tensor = to_neighbours(tensor, placement.heads)
    if placement.axis is not None:
        tensor = tensor.chunk(shards, placement.axis)[number]
    # torch.save would write the whole storage of a view.
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.contiguous().clone()


def _check(source: TensorSource, config: LlamaConfig) -> int:
    """The width of all MLPs. Raises `UnsupportedModelError` for models that Meta's code cannot build."""
    specs = source.specs
    layers, hidden = config.num_hidden_layers, config.hidden_size
    if config.hidden_act != "silu" or getattr(config, "sliding_window", None):
        raise UnsupportedModelError(f"{_REFUSED}: its activation or attention is not LLaMA's")
    if specs[EMBEDDING].shape[1] != hidden:
        raise UnsupportedModelError(
            f"{_REFUSED}: hidden channels were pruned ({specs[EMBEDDING].shape[1]} of {hidden} are left), and "
            "there head_dim is dim / n_heads; prune MLP channels or layers instead"
        )
    biases = sorted(name for name in specs if name.endswith(".bias"))
    if biases:
        raise UnsupportedModelError(f"{_REFUSED}: it has biases ({biases[0]})")
    for n in range(layers):
        for m, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            name = f"model.layers.{n}.self_attn.{m}_proj.weight"
            rows = specs[name].shape[0] if name in specs else 0
            if hidden % config.num_attention_heads or rows != heads * (hidden // config.num_attention_heads):
                raise UnsupportedModelError(
                    f"{_REFUSED}: heads were pruned (layer {n}: {rows} rows in {m}_proj), and there head_dim "
                    "is dim / n_heads in every layer; prune MLP channels or layers instead"
                )
    widths = [
        specs[name].shape[0] for n in range(layers) if (name := f"model.layers.{n}.mlp.gate_proj.weight") in specs
    ]
    if len(widths) != layers or len(set(widths)) != 1:
        raise UnsupportedModelError(
            f"{_REFUSED}: there all MLPs have one width, here they have {min(widths, default=0)} to "
            f"{max(widths, default=0)}; {_EVENLY}"
        )
    return widths[0]


def _tokenizer_file(tokenizer: Any) -> Path:
    """``tokenizer.model`` of a tokenizer, or the file itself."""
    if isinstance(tokenizer, Path):
        places = [tokenizer]
    else:
        named = getattr(tokenizer, "vocab_file", None)
        places = [Path(named)] if named else []
        places.append(Path(str(tokenizer.name_or_path)) / TOKENIZER)
    for place in places:
        if place.is_file() and place.suffix == ".model":
            return place
    raise CheckpointError(
        f"{places[-1]} is missing, and Meta's format has no other tokenizer: name it (--tokenizer), or "
        "write the weights alone (--no-tokenizer)"
    )
