"""Meta's official format, ``params.json``, ``consolidated.NN.pth`` and ``tokenizer.model``: reading and writing it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt
from transformers import GenerationConfig, LlamaConfig, PreTrainedModel

from llmpruner import CheckpointError, UnsupportedModelError, meta_model, read_json

from .meta_tokenizer import TOKENIZER, read_tokenizer, stop_tokens, tiktoken_ranks

PARAMS = "params.json"
_REFUSED = "Meta's format cannot hold this model"
# What ``use_scaled_rope`` stands for in Meta's code.
_SCALED_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
META_FACTOR = 8.0


def scaled_rope_factor(dim: int) -> float:
    """The factor of a release with ``use_scaled_rope``, which its ``params.json`` does not say: 32 for Llama 3.2 (1B
    and 3B, with dim 2048 and 3072), 8 for Llama 3.1 and 3.3 (from dim 4096)."""
    return 32.0 if dim <= 3072 else META_FACTOR


def ffn_width(dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """The width of the MLP as ``FeedForward`` in Meta's ``model.py`` computes it."""
    width = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


class MetaParams(BaseModel):
    """Fields of ``params.json``. ``vocab_size`` −1: as many as the embedding has rows. ``rope_scaling_factor`` None:
    rotary frequencies are not scaled."""

    model_config = ConfigDict(frozen=True, strict=True)

    dim: PositiveInt
    n_layers: PositiveInt
    n_heads: PositiveInt
    n_kv_heads: PositiveInt
    multiple_of: PositiveInt = 256
    ffn_dim_multiplier: PositiveFloat | None = None
    norm_eps: PositiveFloat = 1e-5
    vocab_size: int = -1
    rope_theta: PositiveFloat = 10000.0
    rope_scaling_factor: PositiveFloat | None = None

    @classmethod
    def read(cls, path: Path) -> MetaParams:
        values = {name: value for name, value in read_json(path).items() if value is not None}
        params = cls.model_validate({"n_kv_heads": values.get("n_heads"), **values})
        factor = params.rope_scaling_factor or scaled_rope_factor(params.dim)
        return params.model_copy(update={"rope_scaling_factor": factor if values.get("use_scaled_rope") else None})

    @classmethod
    def of(cls, config: LlamaConfig, *, width: int, vocabulary: int) -> MetaParams:
        """For a model of ``config`` whose MLPs all have the width ``width``. ``vocabulary``: rows of the embedding.
        Raises `UnsupportedModelError` for other rotary scaling than Meta's."""
        dim = config.hidden_size
        multiple_of, multiplier = 256, None
        if ffn_width(dim, multiple_of, multiplier) != width:
            # Meta's formula is now int(multiplier · int(8·dim/3)), which gives any width.
            multiple_of, multiplier = 1, (width + 0.5) / ffn_width(dim, 1, None)
        rope = dict(config.rope_parameters)
        kind, theta = rope.pop("rope_type", "default"), float(rope.pop("rope_theta", 10000.0))
        factor = None
        if kind == "llama3" and {k: rope.get(k) for k in _SCALED_ROPE} == _SCALED_ROPE:
            factor = float(rope["factor"])
        elif kind != "default":
            raise UnsupportedModelError(f"Meta's format cannot express rotary scaling of type '{kind}' with {rope}")
        return cls(
            dim=dim,
            n_layers=config.num_hidden_layers,
            n_heads=config.num_attention_heads,
            n_kv_heads=config.num_key_value_heads,
            multiple_of=multiple_of,
            ffn_dim_multiplier=multiplier,
            norm_eps=config.rms_norm_eps,
            vocab_size=vocabulary,
            rope_theta=theta,
            rope_scaling_factor=factor,
        )

    def to_json(self) -> dict[str, Any]:
        """The fields without those of later releases that have their defaults, as Meta's older code refuses unknown
        ones; its later code ignores them: ``rope_scaling_factor`` is for `read` alone."""
        factor = scaled_rope_factor(self.dim)
        defaults = {"n_kv_heads": self.n_heads, "rope_theta": 10000.0, "rope_scaling_factor": factor}
        values = {k: v for k, v in self.model_dump(exclude_none=True).items() if v != defaults.get(k)}
        return values if self.rope_scaling_factor is None else {**values, "use_scaled_rope": True}

    @property
    def ffn_width(self) -> int:
        return ffn_width(self.dim, self.multiple_of, self.ffn_dim_multiplier)

    @property
    def max_positions(self) -> int:
        """The trained context, which the format does not store, from the fields that tell the release."""
        if self.rope_scaling_factor is not None:
            return 131072  # Llama 3.1 and later
        if self.rope_theta >= 1_000_000:
            return 16384  # Code Llama
        if self.rope_theta > 10_000:
            return 8192  # Llama 3
        return 2048 if self.norm_eps < 1e-5 else 4096  # Llama 1, Llama 2


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a tensor is stored. ``meta`` and ``name``: its names in Meta's and Hugging Face's format. ``axis``: along
    which shards split it; None: each has all of it. ``heads``: whose rotary dimensions it produces, 0 for none."""

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
    """Rows (heads · head_dim, in) of each head from Meta's order, where rotated pairs are adjacent, to transformers',
    where they are half a head apart."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def to_neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `to_rotate_half`."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


class MetaFolder:
    """A folder in Meta's format, its weights mapped from the files. Creation raises `CheckpointError` for a missing
    file, shard or tensor."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.params = directory, MetaParams.read(directory / PARAMS)
        paths = sorted(directory.glob("consolidated.*.pth"))
        self._shards = [_mapped(path) for path in paths]
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
            tensor = parts[0] if placement.axis is None else torch.cat(parts, placement.axis)
            tensor = to_rotate_half(tensor, placement.heads) if placement.heads else tensor
            state[name] = tensor.to(dtype or tensor.dtype, copy=tensor is parts[0])
        return state

    def config(self, tokenizer: Any | None) -> LlamaConfig:
        """Without a tokenizer, the special ids are those of the SentencePiece models of Llama 1 and 2."""
        if tokenizer is not None and len(tokenizer) > self.vocabulary:
            raise CheckpointError(
                f"{self.directory}: its tokenizer has {len(tokenizer)} tokens, its embedding {self.vocabulary} rows: "
                "the two belong to different models"
            )
        params = self.params
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": params.rope_theta}
        if params.rope_scaling_factor is not None:
            rope |= {"rope_type": "llama3", "factor": params.rope_scaling_factor, **_SCALED_ROPE}
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=params.dim,
            intermediate_size=params.ffn_width,
            num_hidden_layers=params.n_layers,
            num_attention_heads=params.n_heads,
            num_key_value_heads=params.n_kv_heads,
            max_position_embeddings=params.max_positions,
            rms_norm_eps=params.norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=self.tied,
            bos_token_id=1 if tokenizer is None else tokenizer.bos_token_id,
            eos_token_id=2 if tokenizer is None else tokenizer.eos_token_id,
            dtype=self.dtype,
            architectures=["LlamaForCausalLM"],
            name_or_path=str(self.directory),
        )


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
                f"{directory}: {name} has shape {tuple(state[name].shape)}; {PARAMS} makes it "
                f"{tuple(parameter.shape)}: a consolidated.NN.pth is missing, or of another model"
            )
    model.load_state_dict(state, strict=not folder.tied, assign=True)
    model.tie_weights()
    stops = [config.eos_token_id] if tokenizer is None else stop_tokens(tokenizer)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=stops if len(stops) > 1 else stops[0]
    )
    return model


def tokenizer_in(directory: Path) -> Any | None:
    """The tokenizer of ``tokenizer.model`` in a folder, or in its parent, where Meta's download script puts it."""
    files = [folder / TOKENIZER for folder in (directory, directory.absolute().parent)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return None
    return read_tokenizer(file, scaled_rope=MetaParams.read(directory / PARAMS).rope_scaling_factor is not None)


def _mapped(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, mapped into memory. Code in its pickle is not run."""
    try:
        tensors: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return tensors
    except Exception as error:  # a damaged archive or pickle can raise anything
        raise CheckpointError(
            f"{path} is damaged, or holds pickled code, which is never run; download it again"
        ) from error


def write_meta(model: PreTrainedModel, tokenizer: Path | None, directory: Path, shards: int = 1) -> MetaParams:
    """Write ``model`` into ``directory``, with a copy of the ``tokenizer.model``, if any. Raises
    `UnsupportedModelError` when the format can't represent the model."""
    state = model.state_dict()
    width, vocabulary = _mlp_width(model, state), len(state["model.embed_tokens.weight"])
    params = MetaParams.of(model.config, width=width, vocabulary=vocabulary)
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
    """Read ``directory`` back. Raises `CheckpointError` where sizes, rotary settings or tensors are not those of
    ``model``."""
    folder, state = MetaFolder(directory), model.state_dict()
    # `tokenizer_in` would also take an unrelated one of the parent folder.
    config = folder.config(tokenizer_in(directory) if (directory / TOKENIZER).is_file() else None)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    for field in (*sizes, "rms_norm_eps", "rope_parameters"):
        read, expected = getattr(config, field), getattr(model.config, field)
        if read != expected:
            raise CheckpointError(f"Meta's format does not keep {field}: it was {expected}, and is read back as {read}")
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


def _mlp_width(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> int:
    """The width of all MLPs. Raises `UnsupportedModelError` for models that Meta's code can't build."""
    config = model.config
    hidden, heads = config.hidden_size, config.num_attention_heads
    if config.model_type not in ("llama", "mistral") or config.hidden_act != "silu":
        raise UnsupportedModelError(f"{_REFUSED}: it holds LLaMA, and this is {config.model_type}, {config.hidden_act}")
    if getattr(config, "sliding_window", None):
        raise UnsupportedModelError(f"{_REFUSED}: its attention has a sliding window")
    biased = next((name for name in state if name.endswith(".bias")), None)
    if biased is not None:
        raise UnsupportedModelError(f"{_REFUSED}: it has biases ({biased})")
    widths = set()
    for number, layer in enumerate(model.model.layers):
        widths.add(len(layer.mlp.gate_proj.weight))
        query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        if query.shape != (hidden, hidden) or len(key) * heads != hidden * config.num_key_value_heads:
            raise UnsupportedModelError(
                f"{_REFUSED}: heads or hidden channels were pruned (layer {number}: {tuple(query.shape)} in q_proj), "
                "and there head_dim is dim / n_heads in every layer; prune MLP channels or layers instead"
            )
    if len(widths) != 1:
        raise UnsupportedModelError(
            f"{_REFUSED}: there all MLPs have the same width, here they have {min(widths)} to {max(widths)}; prune "
            "every MLP by the same share (--set prune.unit_ratio=…, prune.layers=all), or whole layers (--kinds layer)"
        )
    return widths.pop()
