"""Vicuna's official delta weights: every tensor of LLaMA plus the delta's, in float16.

Source: FastChat (Apache-2.0), ``fastchat/model/apply_delta.py``. v1.1 has LLaMA's vocabulary. v0 has a token
more, ``[PAD]``, for which LLaMA's embedding and head get a row of zeros before the delta is added.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from llmpruner_llama.meta_format import MetaTensors
from llmpruner_llama.meta_reader import MetaReader
from llmpruner_llama.output import write_safetensors
from llmpruner_llama.tensors import HuggingFaceTensors, TensorSource, TensorSpec
from transformers import AutoConfig

from llmpruner import CheckpointError, ModelError, new_directory

from .conversation import V0_ZERO_SHOT, V1_1
from .recognition import chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_TOKENIZER = ("tokenizer.model", "tokenizer.json")
_TOKENIZER_EXTRAS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


class DeltaTensors:
    """The sum of a base and a delta; a `TensorSource`. Raises `CheckpointError` for a delta of another base."""

    def __init__(self, base: TensorSource, delta: TensorSource, names: tuple[Path, Path]) -> None:
        self._base, self._delta = base, delta
        difference = f"{names[1]} is no delta for {names[0]}"
        for only, whose in ((set(delta.specs) - set(base.specs), 1), (set(base.specs) - set(delta.specs), 0)):
            if only:
                raise CheckpointError(f"{difference}: only {names[whose]} has {min(only)}")
        grown = {name: self._extra_rows(name) for name in _VOCABULARY if name in delta.specs}
        self.extra_tokens = grown[_VOCABULARY[0]]
        for name, spec in delta.specs.items():
            rows, *rest = base.specs[name].shape
            if spec.shape != (rows + (self.extra_tokens if name in _VOCABULARY else 0), *rest):
                raise CheckpointError(f"{difference}: {name} is {spec.shape} there and {(rows, *rest)} in the base")
        if self.extra_tokens not in (0, 1):
            raise CheckpointError(
                f"{difference}: it has {self.extra_tokens:+} tokens; expected +0 (v1.1) or +1, [PAD] (v0)"
            )
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(spec.shape, torch.float16) for name, spec in delta.specs.items()
        }

    def _extra_rows(self, name: str) -> int:
        return self._delta.specs[name].shape[0] - self._base.specs[name].shape[0]

    def read(self, name: str) -> torch.Tensor:
        base = self._base.read(name).to(torch.float16)
        delta = self._delta.read(name).to(torch.float16)
        if base.shape != delta.shape:
            base = torch.cat([base, base.new_zeros(delta.shape[0] - base.shape[0], *base.shape[1:])])
        return base + delta


def apply_delta(base: Path, delta: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write ``base`` + ``delta`` to ``target``, with the delta's configuration and tokenizer.

    ``base``: LLaMA in Hugging Face's or Meta's format. The sum is computed in float16, and stored in ``dtype`` (None:
    float16). One tensor of each is in memory at a time. Raises `CheckpointError` when the delta is for another base, or
    files are missing or damaged; nothing is written then.
    """
    tokenizer = [delta / name for name in _TOKENIZER if (delta / name).is_file()]
    if not tokenizer:
        raise CheckpointError(f"{delta} has no tokenizer ({' or '.join(_TOKENIZER)}): download it again, in full")
    base_config, delta_config = _config(base), _config(delta)
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
        ours, theirs = getattr(base_config, name), getattr(delta_config, name)
        if ours != theirs:
            raise CheckpointError(f"{delta} is no delta for {base}: {name} is {theirs} there and {ours} in the base")
    tensors: TensorSource = MetaTensors(base) if MetaReader().recognises(base) else HuggingFaceTensors(base)
    total = DeltaTensors(tensors, HuggingFaceTensors(delta), (base, delta))
    delta_config.dtype = dtype or torch.float16
    with new_directory(target, empty=True) as stage:
        write_safetensors(stage, total, dtype)
        delta_config.save_pretrained(stage)
        extras = (delta / name for name in (*_TOKENIZER_EXTRAS, "generation_config.json"))
        for file in (*tokenizer, *extras):
            if file.is_file():
                shutil.copyfile(file, stage / file.name)
        if not (stage / "chat_template.jinja").exists():
            template = V0_ZERO_SHOT if total.extra_tokens else V1_1
            (stage / "chat_template.jinja").write_text(chat_template(template), encoding="utf-8")


def _config(directory: Path) -> PreTrainedConfig:
    if MetaReader().recognises(directory):
        return MetaReader().read_config(directory)
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} is no model directory: it has neither config.json nor params.json")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}/config.json is damaged: {str(error).splitlines()[0]}") from error
    if config.model_type != "llama":
        raise ModelError(f"{directory} is a model of type '{config.model_type}'; expected LLaMA")
    return config
