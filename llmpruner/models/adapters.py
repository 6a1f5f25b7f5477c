"""Checkpoints of peft adapters."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from ..errors import CheckpointError, MissingExtraError, first_line
from ..files import exists
from ..folders import new_directory
from .manifest import write_origin
from .record import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_ADAPTER_FILE = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def save_adapter(
    model: Any,
    directory: Path,
    *,
    base: str,
    tokenizer: Any | None,
    extra_files: Sequence[Path] = (),
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapters of a peft model alone; ``base``: reference of the base model, stored with them.
    ``extra_files``: copied into the directory. ``origin``: JSON values for ``llmpruner-files.json``, which has the
    hashes of all files.

    Raises `OutputError` when ``directory`` exists or cannot be written.
    """
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    with new_directory(directory) as partial:
        with warnings.catch_warnings():
            # peft looks for the vocabulary of the base, of which an adapter as the base has none.
            warnings.filterwarnings("ignore", message="Could not find a config file", category=UserWarning)
            model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        for file in extra_files:
            shutil.copyfile(file, partial / file.name)
        write_origin(partial, {"adapters_of": base, **(origin or {})})


def adapter_base(path: Path) -> str | None:
    """Reference of the base model of the peft adapter in directory ``path``: a folder inside ``path``, or as its
    configuration names it; None when ``path`` is no adapter. Raises `CheckpointError` when its file is damaged, or the
    base is, over other adapters or not, the adapter itself."""
    base = _named_base(path)
    seen, current = {path.resolve()}, base
    while current is not None:
        folder = Path(current)
        if folder.resolve() in seen:
            raise CheckpointError(f"{path / _ADAPTER_FILE} names the adapter itself as the model that it adapts")
        seen.add(folder.resolve())
        current = _named_base(folder)
    return base


def _named_base(path: Path) -> str | None:
    file = path / _ADAPTER_FILE
    if not exists(file):
        return None
    base = read_json(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or "\0" in base:
        raise CheckpointError(f"{file} does not name the model that it adapts (base_model_name_or_path)")
    return str(path / base) if exists(path / base) and (path / base).is_dir() else base


def with_adapter(model: PreTrainedModel, path: Path) -> Any:
    """``model`` with the peft adapter in directory ``path``, as a peft model in evaluation mode.

    Raises `CheckpointError` when the adapter is damaged or belongs to another model.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise MissingExtraError("peft", "recover") from error
    load: Callable[..., Any] = PeftModel.from_pretrained
    # A damaged adapter can raise anything, from the parser of its configuration to torch.
    try:
        with warnings.catch_warnings():
            # peft only warns of missing tensors, and initializes them randomly.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            # peft reads a name that transformers has deprecated.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            adapted = load(model, str(path)).eval()
        unknown = _stored(path) - get_peft_model_state_dict(adapted).keys()
        if unknown:
            raise ValueError(f"the model has no place for its tensor {min(unknown)}")
        return adapted
    except Exception as error:
        base = model.config.name_or_path
        raise CheckpointError(f"the adapter in {path} does not fit '{base}': {first_line(error)}") from error


def _stored(path: Path) -> set[str]:
    """Names of the tensors of an adapter; empty for an adapter in an older format than safetensors."""
    file = path / ADAPTER_WEIGHTS
    if not file.is_file():
        return set()
    with safe_open(file, framework="pt") as tensors:
        return set(tensors.keys())
