"""Loading a checkpoint that llmpruner wrote; code in the checkpoint does not run unless the caller allows it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..errors import CheckpointError, first_line
from ..validation import path_from
from .adapters import adapter_base, with_adapter
from .manifest import check_weights
from .modeling_llmpruner import base_class, pruned_model
from .quiet import quiet_transformers
from .remote import ALLOW, pruned_class

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_pruned(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a checkpoint of `save_checkpoint`, stock or not, or a LoRA adapter for one, or for another adapter, which is
    merged then.

    ``path``: a directory or a hub id; any other stock checkpoint loads too. ``dtype``: as saved unless given.
    ``trust_remote_code``: whether code in the checkpoint may run. Only a model whose class is in neither transformers
    nor an installed plugin needs it; for all others llmpruner's own code is used.
    Raises `CheckpointError` when a file is missing or damaged (see `manifest.check_weights`), or a tensor is missing,
    unknown or of another shape.
    """
    base = adapter_base(path_from("path", path, "a path or a hub id"))
    if base is not None:
        check_weights(Path(path))
        model = load_pruned(
            base,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
        if hasattr(model, "merge_and_unload"):
            # Itself an adapter, whose names peft does not find in those of a second one.
            model = model.merge_and_unload()
        return cast("PreTrainedModel", with_adapter(model, Path(path)))
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise CheckpointError(f"{path} is no checkpoint: it has no config.json")
    if Path(path).is_dir():
        check_weights(Path(path))

    options: dict[str, Any] = {"dtype": dtype or "auto", "use_safetensors": True, "output_loading_info": True}
    options["trust_remote_code"] = trust_remote_code
    options["ignore_mismatched_sizes"] = True  # they are an error below, which names the tensor
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        with quiet_transformers():
            model, info = model_class(path, trust_remote_code).from_pretrained(str(path), **options)
    except CheckpointError:
        raise
    except Exception as error:  # classes of configurations and the libraries of weights raise what they like
        raise CheckpointError(f"{path} cannot be loaded: {first_line(error)}") from error
    for trouble in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        for key in sorted(map(str, info[trouble])):
            raise CheckpointError(f"the weights of {path} are incomplete or damaged: {trouble[:-5]} tensor {key}")
    return cast("PreTrainedModel", model.to(device).eval())


def model_class(path: str | Path, trust_remote_code: bool) -> Any:
    """The class that loads ``path``: for a shim checkpoint, the pruned class in its record; else the auto class."""
    config, _ = PreTrainedConfig.get_config_dict(str(path))
    if "llmpruner" not in config:
        return AutoModelForCausalLM
    try:
        return pruned_model(base_class(config["llmpruner"]))
    except ValueError as error:
        if trust_remote_code:
            return pruned_class(path)
        raise ValueError(f"{first_line(error)}; the checkpoint contains a copy: {ALLOW}") from error
