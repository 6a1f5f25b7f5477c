"""Models in Meta's official format as transformers models, and their conversion to Hugging Face's format."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, PreTrainedModel

from llmpruner import CheckpointError, meta_model, new_directory

from .meta_files import PARAMS, TOKENIZER
from .meta_format import MetaTensors
from .meta_params import MetaParams
from .meta_tokenizer import find_tokenizer, is_tiktoken, read_tokenizer, stop_tokens
from .output import write_safetensors


def model_in(path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model in the folder ``path``; ``dtype`` None: as stored. Peak memory: the model and its largest tensor."""
    tensors = MetaTensors(path)
    config = config_of(tensors, tokenizer_in(tensors.directory))
    config.dtype = dtype or tensors.dtype
    model = meta_model(config)
    model.config.name_or_path = str(tensors.directory)
    state = {name: tensors.read_own(name, dtype) for name in tensors.specs}
    model.load_state_dict(state, strict=not tensors.tied, assign=True)
    model.tie_weights()
    return model.eval()


def config_in(path: Path) -> LlamaConfig:
    """The configuration of the model in the folder ``path``."""
    config = config_of(MetaTensors(path), tokenizer_in(path))
    config.name_or_path = str(path)
    return config


def tokenizer_in(path: Path) -> Any | None:
    """The tokenizer of the folder ``path`` (see `find_tokenizer`); None when it has none."""
    file = find_tokenizer(path)
    if file is None:
        return None
    return read_tokenizer(file, scaled_rope=MetaParams.read(path / PARAMS).rope_scaling_factor is not None)


def config_of(tensors: MetaTensors, tokenizer: Any | None) -> LlamaConfig:
    """The configuration of a folder in Meta's format. Without a tokenizer, the special ids are those of the
    SentencePiece models of Llama 1 and 2."""
    if tokenizer is not None and len(tokenizer) > tensors.vocabulary:
        raise CheckpointError(
            f"{tensors.directory}: its tokenizer has {len(tokenizer)} tokens, its embedding "
            f"{tensors.vocabulary} rows: the two belong to different models"
        )
    return tensors.params.to_config(
        tensors.vocabulary,
        tied=tensors.tied,
        bos=1 if tokenizer is None else tokenizer.bos_token_id,
        eos=2 if tokenizer is None else tokenizer.eos_token_id,
        dtype=tensors.dtype,
    )


def convert_to_huggingface(
    source: Path, target: Path, dtype: torch.dtype | None = None, *, tokenizer: bool = True
) -> None:
    """Write the model in ``source``, in Meta's format, to ``target`` in Hugging Face's.

    ``dtype`` None: as stored. ``tokenizer`` False: convert the weights alone. One tensor is in memory at a time. Raises
    `CheckpointError` when the source is incomplete or damaged, or has no tokenizer, and `OutputError` when the target
    exists.
    """
    tensors = MetaTensors(source)
    file = find_tokenizer(source)
    if tokenizer and file is None:
        raise CheckpointError(
            f"{source} has no {TOKENIZER}, nor has the folder above it: put it there, or convert the weights "
            "alone with --no-tokenizer"
        )
    read = tokenizer_in(source) if tokenizer else None
    config = config_of(tensors, read)
    config.dtype = dtype or tensors.dtype
    with new_directory(target, empty=True) as stage:
        write_safetensors(stage, tensors, dtype)
        config.save_pretrained(stage)
        stops = [config.eos_token_id] if read is None else stop_tokens(read)
        GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=stops if len(stops) > 1 else stops[0]
        ).save_pretrained(stage)
        if read is not None and file is not None:
            read.save_pretrained(stage)
            if not is_tiktoken(file):
                shutil.copyfile(file, stage / TOKENIZER)
