"""Reading Meta's official format: ``params.json``, ``consolidated.NN.pth`` and ``tokenizer.model``."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from llmpruner import CheckpointError, meta_model

from .meta_params import MetaParams
from .meta_tokenizer import find_tokenizer, read_tokenizer, stop_tokens

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel

PARAMS = "params.json"


@dataclass(frozen=True, slots=True)
class Placement:
    """The storage of a tensor. ``meta`` and ``name``: its names in Meta's and Hugging Face's format. ``axis``: the axis
    that is split over the shards, None when every shard has all of it. ``heads``: the number of heads whose rotary
    dimensions it produces, 0 for none."""

    meta: str
    name: str
    axis: int | None
    heads: int = 0


def placements(params: MetaParams, *, tied: bool, embedding_axis: int) -> Iterator[Placement]:
    """Every tensor, in the model's order. Llama 1 and 2 split the embedding on axis 1, Llama 3 on axis 0."""
    yield Placement("tok_embeddings.weight", "model.embed_tokens.weight", embedding_axis)
    for n in range(params.n_layers):
        ours, theirs = f"model.layers.{n}", f"layers.{n}"
        yield Placement(f"{theirs}.attention_norm.weight", f"{ours}.input_layernorm.weight", None)
        for m, axis, heads in (("q", 0, params.n_heads), ("k", 0, params.n_kv_heads), ("v", 0, 0), ("o", 1, 0)):
            yield Placement(f"{theirs}.attention.w{m}.weight", f"{ours}.self_attn.{m}_proj.weight", axis, heads)
        yield Placement(f"{theirs}.ffn_norm.weight", f"{ours}.post_attention_layernorm.weight", None)
        for w, m, axis in (("w1", "gate", 0), ("w3", "up", 0), ("w2", "down", 1)):
            yield Placement(f"{theirs}.feed_forward.{w}.weight", f"{ours}.mlp.{m}_proj.weight", axis)
    yield Placement("norm.weight", "model.norm.weight", None)
    if not tied:
        yield Placement("output.weight", "lm_head.weight", 0)


def to_rotate_half(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of each head from Meta's order, where rotated pairs are adjacent, to transformers', where they
    are half a head apart. ``weight``: (heads · head_dim, in)."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def to_neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `to_rotate_half`."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


class MetaFolder:
    """A folder in Meta's format, its weights mapped from the files. Creation raises `CheckpointError` for a missing
    file, shard or tensor."""

    def __init__(self, directory: Path) -> None:
        if not (directory / PARAMS).is_file():
            raise CheckpointError(f"{directory} is no LLaMA folder in Meta's format: it has no {PARAMS}")
        self.directory, self.params = directory, MetaParams.read(directory / PARAMS)
        paths = _shard_paths(directory)
        self._shards = [_mapped(path) for path in paths]
        # The query projection is split by rows.
        name, size = "layers.0.attention.wq.weight", (self.params.dim // len(paths), self.params.dim)
        shape = tuple(self._shards[0][name].shape) if name in self._shards[0] else "missing"
        if shape != size:
            raise CheckpointError(
                f"{directory}: {name} is {shape}, and {len(paths)} shards and {PARAMS} make it {size}: a "
                "consolidated.NN.pth is missing, or of another model"
            )
        self.tied = "output.weight" not in self._shards[0]
        embedding = self._shards[0].get("tok_embeddings.weight")
        axis = 0 if embedding is not None and embedding.shape[-1] == self.params.dim else 1
        self._placements = {p.name: p for p in placements(self.params, tied=self.tied, embedding_axis=axis)}
        expected = {p.meta for p in self._placements.values()}
        for path, shard in zip(paths, self._shards, strict=True):
            for name in sorted(expected - set(shard)):
                raise CheckpointError(f"{path} lacks {name}, which {PARAMS} promises")
            for name in sorted(set(shard) - expected - {"rope.freqs"}):
                raise CheckpointError(f"{path} holds {name}, which no LLaMA with {self.params.n_layers} layers has")
        self.dtype = self._shards[0]["norm.weight"].dtype
        self.vocabulary = self._shards[0]["tok_embeddings.weight"].shape[0] * (1 if axis else len(paths))

    def state(self, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        """The weights by Hugging Face's names, merged over the shards; ``dtype`` None: as stored."""
        state = {}
        for name, placement in self._placements.items():
            parts = [shard[placement.meta] for shard in self._shards]
            try:
                tensor = parts[0] if placement.axis is None else torch.cat(parts, placement.axis)
                tensor = to_rotate_half(tensor, placement.heads) if placement.heads else tensor
            except RuntimeError:
                raise CheckpointError(
                    f"{self.directory}: {placement.meta} has shapes {[tuple(p.shape) for p in parts]}, which do not "
                    f"belong to the same model as {PARAMS}"
                ) from None
            state[name] = tensor.to(dtype or tensor.dtype, copy=tensor is parts[0])
        return state

    def config(self, tokenizer: Any | None) -> LlamaConfig:
        """Without a tokenizer, the special ids are those of the SentencePiece models of Llama 1 and 2."""
        if tokenizer is not None and len(tokenizer) > self.vocabulary:
            raise CheckpointError(
                f"{self.directory}: its tokenizer has {len(tokenizer)} tokens, its embedding {self.vocabulary} rows: "
                "the two belong to different models"
            )
        config = self.params.to_config(
            self.vocabulary,
            tied=self.tied,
            bos=1 if tokenizer is None else tokenizer.bos_token_id,
            eos=2 if tokenizer is None else tokenizer.eos_token_id,
            dtype=self.dtype,
        )
        config.name_or_path = str(self.directory)
        return config


def config_in(directory: Path) -> LlamaConfig:
    return MetaFolder(directory).config(tokenizer_in(directory))


def model_in(directory: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model in ``directory``; ``dtype`` None: as stored."""
    folder = MetaFolder(directory)
    tokenizer = tokenizer_in(directory)
    config = folder.config(tokenizer)
    config.dtype = dtype or folder.dtype
    model, state = meta_model(config), folder.state(dtype)
    for name, parameter in model.named_parameters():
        if state[name].shape != parameter.shape:
            raise CheckpointError(
                f"{directory}: {name} has shape {tuple(state[name].shape)}; {PARAMS} makes it {tuple(parameter.shape)}"
            )
    model.load_state_dict(state, strict=not folder.tied, assign=True)
    model.tie_weights()
    stops = [config.eos_token_id] if tokenizer is None else stop_tokens(tokenizer)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=stops if len(stops) > 1 else stops[0]
    )
    return model.eval()


def tokenizer_in(directory: Path) -> Any | None:
    """The tokenizer of a folder (see `find_tokenizer`); None when it has none."""
    file = find_tokenizer(directory)
    if file is None:
        return None
    return read_tokenizer(file, scaled_rope=MetaParams.read(directory / PARAMS).rope_scaling_factor is not None)


def _shard_paths(directory: Path) -> list[Path]:
    numbers = (path.name.split(".")[1] for path in directory.glob("consolidated.*.pth"))
    last = max((int(number) for number in numbers if number.isdecimal()), default=0)
    paths = [directory / f"consolidated.{n:02}.pth" for n in range(last + 1)]
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{directory} lacks {path.name}: download it")
    return paths


def _mapped(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, mapped into memory, without unpickling code."""
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is truncated, or not a checkpoint that PyTorch 1.6 or later wrote: download it again"
        )
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} holds a pickle with more than tensors, which could run code: it was not loaded"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged ({str(error).splitlines()[0]}): download it again") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(tensor, torch.Tensor) and tensor.is_floating_point() for tensor in tensors.values()
    ):
        raise CheckpointError(f"{path} is not a plain dictionary of floating-point tensors, as a model's weights are")
    return tensors
