"""Vicuna's official delta weights: every tensor of LLaMA plus the delta's, in float16.

Source: FastChat (Apache-2.0), ``fastchat/model/apply_delta.py``. v1.1 has LLaMA's vocabulary. v0 has a token
more, ``[PAD]``, for which LLaMA's embedding and head get a row of zeros before the delta is added.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from llmpruner import CheckpointError, ModelError, load, new_directory

from . import V0, V1_1, VicunaFormat, chat_template

_TOKENIZER = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def apply_delta(base: Path, delta: Path, target: Path) -> None:
    """Write ``base`` + ``delta``, in float16, to ``target``, with the delta's configuration and tokenizer. Raises
    `OutputError` when ``target`` exists, and `CheckpointError` when the delta is for another base; nothing is written
    then."""
    if not delta.is_dir():
        raise ModelError(f"the delta '{delta}' is no folder; download it first (hf download REPO --local-dir DIR)")
    with new_directory(target) as stage:  # refused before the weights are read
        chat_format = _add(base, delta, stage)
        for file in filter(Path.is_file, (delta / name for name in _TOKENIZER)):
            shutil.copyfile(file, stage / file.name)
        if not (stage / "chat_template.jinja").exists():
            (stage / "chat_template.jinja").write_text(chat_template(chat_format), encoding="utf-8")


def _add(base: Path, delta: Path, stage: Path) -> VicunaFormat:
    """Write the sum to ``stage``; returns the conversation format of the delta's version."""
    llama, vicuna = (load(str(path), dtype="float16").network for path in (base, delta))
    difference = f"{delta} is no delta for {base}"
    weights, deltas = llama.state_dict(), vicuna.state_dict()
    for name in sorted(weights.keys() ^ deltas.keys()):
        raise CheckpointError(f"{difference}: only {delta if name in deltas else base} has {name}")
    extra = len(deltas["lm_head.weight"]) - len(weights["lm_head.weight"])
    if extra not in (0, 1):
        raise CheckpointError(f"{difference}: it has {extra:+} tokens; expected +0 (v1.1) or +1, [PAD] (v0)")
    for name, tensor in deltas.items():
        weight = weights[name]
        if extra and name in ("model.embed_tokens.weight", "lm_head.weight"):
            weight = torch.cat([weight, weight.new_zeros(extra, weight.shape[1])])
        if weight.shape != tensor.shape:
            raise CheckpointError(
                f"{difference}: {name} is {tuple(tensor.shape)} there and {tuple(weight.shape)} in the base"
            )
        tensor.add_(weight)
    vicuna.save_pretrained(stage)
    return V0 if extra else V1_1
