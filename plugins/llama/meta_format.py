"""Meta's official weight files, ``consolidated.NN.pth``: names, splits over shards, rotary layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from llmpruner import CheckpointError

from .meta_files import PARAMS, SHARDS
from .meta_params import MetaParams
from .tensors import READ_BUDGET, TensorFiles, TensorSpec

_IGNORED = "rope.freqs"


@dataclass(frozen=True, slots=True)
class Placement:
    """The storage of a tensor. ``meta`` and ``name``: its names in Meta's and Hugging Face's format. ``axis``: the axis
    that is split over the shards, None when every shard has all of it. ``heads``: the number of heads whose rotary
    dimensions it produces, 0 for none."""

    meta: str
    name: str
    axis: int | None
    heads: int = 0


def placements(params: MetaParams, *, tied: bool, embedding_axis: int = 1) -> Iterator[Placement]:
    """Every tensor, in the model's order. Llama 1 and 2 split the embedding on axis 1, Llama 3 on axis 0."""
    yield Placement("tok_embeddings.weight", "model.embed_tokens.weight", embedding_axis)
    for n in range(params.n_layers):
        ours, theirs = f"model.layers.{n}", f"layers.{n}"
        yield Placement(f"{theirs}.attention_norm.weight", f"{ours}.input_layernorm.weight", None)
        for m, axis, heads in (
            ("q", 0, params.n_heads),
            ("k", 0, params.n_kv_heads),
            ("v", 0, 0),
            ("o", 1, 0),
        ):
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


class MetaTensors:
    """The weights of a folder in Meta's format, merged over its shards; a `TensorSource`.

    Creation raises `CheckpointError` for a missing file, shard or tensor, and for shapes that contradict
    ``params.json``; it reads no values. ``budget``: of `TensorFiles`.
    """

    def __init__(self, directory: Path, budget: int = READ_BUDGET) -> None:
        if not (directory / PARAMS).is_file():
            raise CheckpointError(f"{directory} is no LLaMA folder in Meta's format: it has no {PARAMS}")
        self.directory = directory
        self.params = MetaParams.read(directory / PARAMS)
        self._files = TensorFiles(budget)
        self._paths = _shard_paths(directory)
        self._shards = [self._files.specs(path) for path in self._paths]
        self._check_count()
        self.tied = "output.weight" not in self._shards[0]
        self._placements = {
            p.name: p for p in placements(self.params, tied=self.tied, embedding_axis=self._embedding_axis())
        }
        self._check_names()
        self.specs: Mapping[str, TensorSpec] = {name: self._merged(p) for name, p in self._placements.items()}
        self.vocabulary = self.specs["model.embed_tokens.weight"].shape[0]
        self._check_shapes()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored weights."""
        return self.specs["model.embed_tokens.weight"].dtype

    def read(self, name: str) -> torch.Tensor:
        placement = self._placements[name]
        if placement.axis is None or len(self._paths) == 1:
            tensor = self._files.read(self._paths[0], placement.meta)
        else:
            parts = [self._files.read(path, placement.meta) for path in self._paths]
            tensor = torch.cat(parts, placement.axis)
        return to_rotate_half(tensor, placement.heads) if placement.heads else tensor

    def read_own(self, name: str, dtype: torch.dtype | None) -> torch.Tensor:
        """The tensor in its own memory instead of the mapped file; ``dtype`` None: as stored."""
        tensor = self.read(name)
        if dtype not in (None, tensor.dtype):
            return tensor.to(dtype)
        placement = self._placements[name]
        mapped = not placement.heads and (placement.axis is None or len(self._paths) == 1)
        return tensor.clone() if mapped else tensor

    def _check_count(self) -> None:
        """Compare the number of shards with that computed from the query projection, which is split by rows."""
        name = "layers.0.attention.wq.weight"
        first = self._shards[0].get(name)
        if first is None or len(first.shape) != 2:
            raise CheckpointError(f"{self._paths[0]} lacks {name}: it is no LLaMA checkpoint of Meta's")
        dim, rows, found = self.params.dim, first.shape[0], len(self._paths)
        if first.shape[1] != dim or dim % rows:
            raise CheckpointError(
                f"{self._paths[0]}: {name} has shape {first.shape}, but {PARAMS} has dim {dim}: "
                "the two belong to different models"
            )
        if dim // rows != found:
            missing = [f"consolidated.{n:02}.pth" for n in range(found, dim // rows)]
            what = f"{', '.join(missing)} missing" if missing else "the others belong to another model"
            raise CheckpointError(f"{self.directory} has {found} of {dim // rows} shards: {what}")

    def _embedding_axis(self) -> int:
        spec = self._shards[0].get("tok_embeddings.weight")
        return 0 if spec is not None and spec.shape[-1] == self.params.dim else 1

    def _check_names(self) -> None:
        expected = {p.meta for p in self._placements.values()}
        for path, shard in zip(self._paths, self._shards, strict=True):
            missing = sorted(expected - set(shard))
            if missing:
                raise CheckpointError(f"{path} lacks {missing[0]}, which {PARAMS} promises")
            unknown = sorted(set(shard) - expected - {_IGNORED})
            if unknown:
                raise CheckpointError(
                    f"{path} holds {unknown[0]}, which no LLaMA with {self.params.n_layers} layers has"
                )

    def _merged(self, placement: Placement) -> TensorSpec:
        specs = [shard[placement.meta] for shard in self._shards]
        if any(spec != specs[0] for spec in specs):
            raise CheckpointError(
                f"{self.directory}: {placement.meta} differs in shape or type from shard to shard: "
                "they belong to different checkpoints"
            )
        shape = list(specs[0].shape)
        if placement.axis is not None and placement.axis < len(shape):
            shape[placement.axis] *= len(specs)
        return TensorSpec(tuple(shape), specs[0].dtype)

    def _check_shapes(self) -> None:
        params, vocabulary = self.params, self.vocabulary
        if params.vocab_size not in (-1, vocabulary):
            raise CheckpointError(
                f"{self.directory}: {PARAMS} has vocab_size {params.vocab_size}, the embedding has {vocabulary} rows"
            )
        width = self.specs["model.layers.0.mlp.gate_proj.weight"].shape[0]
        if width != params.ffn_width:
            raise CheckpointError(
                f"{self.directory}: {PARAMS} makes the MLP {params.ffn_width} wide, the weights make it "
                f"{width}: the two belong to different models"
            )
        kv_rows = params.n_kv_heads * (params.dim // params.n_heads)
        for name, spec in self.specs.items():
            if not spec.dtype.is_floating_point:
                raise CheckpointError(
                    f"{self.directory}: {self._placements[name].meta} is stored as {spec.dtype}; expected "
                    "floating-point numbers, as quantised weights cannot be read"
                )
            expected = _expected_shape(name, params.dim, kv_rows, width, vocabulary)
            if spec.shape != expected:
                raise CheckpointError(
                    f"{self.directory}: {self._placements[name].meta} has shape {spec.shape}; "
                    f"{PARAMS} makes it {expected}"
                )


def _expected_shape(name: str, dim: int, kv_rows: int, width: int, vocabulary: int) -> tuple[int, ...]:
    kind = name.split(".")[-2]
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (vocabulary, dim),
        "lm_head": (vocabulary, dim),
        "q_proj": (dim, dim),
        "k_proj": (kv_rows, dim),
        "v_proj": (kv_rows, dim),
        "o_proj": (dim, dim),
        "gate_proj": (width, dim),
        "up_proj": (width, dim),
        "down_proj": (dim, width),
    }
    return shapes.get(kind, (dim,))


def _shard_paths(directory: Path) -> list[Path]:
    numbered: dict[int, Path] = {}
    for path in directory.glob(SHARDS):
        number = path.name.split(".")[1]
        if number.isdecimal():
            numbered[int(number)] = path
    if not numbered:
        raise CheckpointError(f"{directory} has no weights in Meta's format: consolidated.00.pth is missing")
    for n in range(max(numbered) + 1):
        if n not in numbered:
            raise CheckpointError(f"{directory} lacks shard consolidated.{n:02}.pth: download it")
    return [numbered[n] for n in sorted(numbered)]
