"""Checkpoints that llmpruner wrote, and peft adapters; code in them does not run unless the caller allows it."""

from __future__ import annotations

import warnings
from os.path import exists, isdir
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ..errors import CheckpointError, MissingExtraError, first_line
from ..files import read_json
from .messages import ALLOW, quiet_transformers
from .modeling_llmpruner import base_class, pruned_model
from .record import check_weights, names_in

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def adapter_base(path: Path) -> str | None:
    """Reference of the base model of the peft adapter in directory ``path``, None when ``path`` is no adapter.
    Raises `CheckpointError` when its file is damaged."""
    file = path / "adapter_config.json"
    if not exists(file):
        return None
    base = read_json(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{file} does not name the model that it adapts (base_model_name_or_path)")
    return str(path / base) if isdir(path / base) else base


def with_adapter(model: PreTrainedModel, path: Path) -> Any:
    """``model`` with the peft adapter in directory ``path``, as a peft model in evaluation mode. Raises
    `CheckpointError` when the adapter is damaged or belongs to another model."""
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise MissingExtraError("peft", "recover") from error
    # A damaged adapter can raise anything, from the parser of its configuration to torch.
    try:
        with warnings.catch_warnings():
            # peft only warns of missing tensors, and initializes them randomly.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            # peft reads a name that transformers has deprecated.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            adapted = PeftModel.from_pretrained(model, str(path)).eval()
        weights = path / "adapter_model.safetensors"
        if weights.is_file():  # there are older formats
            unknown = set(names_in(weights)) - get_peft_model_state_dict(adapted).keys()
            if unknown:
                raise ValueError(f"the model has no place for its tensor {min(unknown)}")
        return adapted
    except Exception as error:
        base = model.config.name_or_path
        raise CheckpointError(f"the adapter in {path} does not fit '{base}': {first_line(error)}") from error


def load_pruned(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a checkpoint of `save_checkpoint`, stock or not, or an adapter for one.

    ``path``: a directory or a hub id; any other stock checkpoint loads too. ``dtype``: None: as saved.
    ``trust_remote_code``: whether code in the checkpoint may run, which a model needs whose class is in neither
    transformers nor an installed plugin. Raises `CheckpointError` when a file is missing or damaged, or a tensor is
    missing, unknown or of another shape.
    """
    place = Path(path)
    base = adapter_base(place)
    if place.is_dir():
        check_weights(place)
    if base is not None:
        model: Any = load_pruned(
            base, dtype=dtype, device=device, attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        return cast("PreTrainedModel", with_adapter(model, place))
    try:
        with quiet_transformers():
            model, info = model_class(path, trust_remote_code).from_pretrained(
                str(path),
                dtype=dtype or "auto",
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are an error below, which names the tensor
                trust_remote_code=trust_remote_code,
                **({} if attn_implementation is None else {"attn_implementation": attn_implementation}),
            )
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


def pruned_class(directory: str | Path) -> type[PreTrainedModel]:
    """The class of the pruned checkpoint in ``directory``, loaded from the code in it. The dense classes that it was
    made from are registered with AutoConfig and AutoModelForCausalLM. Call it only where that code may run."""
    values, _ = PreTrainedConfig.get_config_dict(str(directory))
    pruned: Any = get_class_from_dynamic_module(values["auto_map"]["AutoModelForCausalLM"], str(directory))
    base: type[PreTrainedModel] = pruned.pruned_base
    AutoConfig.register(base.config_class.model_type, base.config_class, exist_ok=True)
    AutoModelForCausalLM.register(base.config_class, base, exist_ok=True)
    return cast("type[PreTrainedModel]", pruned)
