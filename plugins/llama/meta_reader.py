"""Meta's official format as a checkpoint reader, and its conversion to Hugging Face's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpruner import CheckpointError, CheckpointReader

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, PreTrainedModel

    from .meta_format import MetaTensors


class MetaReader(CheckpointReader):
    """``params.json`` and ``consolidated.NN.pth``, as Meta publishes LLaMA 1, 2 and 3."""

    name = "meta-llama"
    summary = "LLaMA 1, 2 and 3 as Meta publishes them: params.json and consolidated.NN.pth"
    family = "llama"

    def recognises(self, path: Path) -> bool:
        if not path.is_dir() or (path / "config.json").exists():
            return False
        weights = any(path.glob("consolidated.*.pth"))
        # With its shards missing, a folder should still be refused by the one who can say what is missing.
        return weights or ((path / "params.json").is_file() and not any(path.glob("*.safetensors")))

    def read_config(self, path: Path) -> LlamaConfig:
        from .meta_format import MetaTensors

        config = config_of(MetaTensors(path), self.read_tokenizer(path))
        config.name_or_path = str(path)
        return config

    def read_model(self, path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
        """Peak memory: the model and its largest tensor."""
        from llmpruner import meta_model

        from .meta_format import MetaTensors

        tensors = MetaTensors(path)
        config = config_of(tensors, self.read_tokenizer(path))
        config.dtype = dtype or tensors.dtype
        model = meta_model(config)
        state = {name: tensors.read_own(name, dtype) for name in tensors.specs}
        model.load_state_dict(state, strict=not tensors.tied, assign=True)
        model.tie_weights()
        model.config.name_or_path = str(path)
        return model.eval()

    def read_tokenizer(self, path: Path) -> Any | None:
        from .meta_params import MetaParams
        from .meta_tokenizer import find_tokenizer, read_tokenizer

        file = find_tokenizer(path)
        if file is None:
            return None
        params = MetaParams.read(path / "params.json")
        return read_tokenizer(file, scaled_rope=params.rope_scaling_factor is not None)


def convert_to_huggingface(
    source: Path, target: Path, dtype: torch.dtype | None = None, *, tokenizer: bool = True
) -> None:
    """Write the model in ``source``, in Meta's format, to ``target`` in Hugging Face's.

    ``dtype`` None: as stored. ``tokenizer`` false: convert the weights alone. One tensor is in memory at a
    time. Raises `CheckpointError` when the source is incomplete or damaged, or brings no tokenizer, and
    `OutputError` when the target exists.
    """
    from transformers import GenerationConfig

    from .meta_format import MetaTensors
    from .meta_tokenizer import TOKENIZER, find_tokenizer, is_tiktoken, stop_tokens
    from .output import new_directory, write_safetensors

    tensors = MetaTensors(source)
    file = find_tokenizer(source)
    if tokenizer and file is None:
        raise CheckpointError(
            f"{source} has no {TOKENIZER}, nor has the folder above it: put it there, or convert the weights "
            "alone with --no-tokenizer"
        )
    read = MetaReader().read_tokenizer(source) if tokenizer else None
    config = config_of(tensors, read)
    config.dtype = dtype or tensors.dtype
    with new_directory(target) as stage:
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
