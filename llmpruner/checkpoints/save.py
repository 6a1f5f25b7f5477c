"""Saving a cut model as an ordinary Hugging Face directory, and loading it without remote code."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..errors import CheckpointError
from ..files import new_directory
from ..models.quiet import quiet_transformers
from .record import RECORD_FILE
from .shim import shim_model, stock_config
from .stock import same_buffers, stock_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..structure.architecture import StatesConfigs


def save_checkpoint(
    model: PreTrainedModel,
    directory: Path,
    *,
    record: Mapping[str, Any],
    tokenizer: Any | None = None,
    family: StatesConfigs | None = None,
    extra_files: Sequence[Path] = (),
) -> Literal["stock", "shim"]:
    """Write ``model`` to the new ``directory``; returns the form.

    *stock*: a configuration of transformers states it exactly; transformers alone loads it.
    *shim*: its layers differ, and the directory carries ``modeling_llmpruner.py``. Either form is rebuilt
    first, sharing the weights, and must give the same logits as ``model`` on its ``dummy_inputs``.

    ``record``: JSON values, written to ``llmpruner.json`` beside the weights.
    ``family``: may propose further stock configurations.
    ``extra_files``: copied into the directory. Code of a base class outside transformers needs no mention.

    Raises `OutputError` when ``directory`` exists or cannot be written, and `CheckpointError` for weights
    that are not finite and for a model that no configuration and record can state. ``directory`` does not exist then.
    """
    _check_weights(model)
    shell, form = _shell(model, family)
    text = _json(record)
    with new_directory(directory) as partial:
        (partial / RECORD_FILE).write_text(text, encoding="utf-8")
        with quiet_transformers():
            # Other readers of a stock model expect transformers' original names (experts one by one).
            shell.save_pretrained(partial, save_original_format=form == "stock")
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
        for file in extra_files:
            shutil.copyfile(file, partial / file.name)
    return form


def _shell(model: PreTrainedModel, family: StatesConfigs | None) -> tuple[PreTrainedModel, Literal["stock", "shim"]]:
    """An instance of the class that will be saved, holding the weights of ``model``."""
    config = stock_config(model)
    expected = _logits(model)
    stock = stock_model(model, config, family)
    if stock is not None and _fill(stock, model) and _agree(expected, stock):
        return stock, "stock"
    pruned = shim_model(model, config)
    if not _fill(pruned, model):
        raise CheckpointError(
            f"{type(model).__name__} has buffers that a checkpoint cannot keep; they must be persistent"
        )
    if not _agree(expected, pruned):
        raise CheckpointError(
            f"the rebuilt model gives other outputs than the cut {type(model).__name__}: "
            "something was changed that is neither a tensor nor a plain attribute of a module"
        )
    return pruned, "shim"


def _fill(shell: PreTrainedModel, model: PreTrainedModel) -> bool:
    """Let ``shell`` share all tensors of ``model``; false when the buffers that are not saved differ."""
    if not same_buffers(model, shell):
        return False
    shell.load_state_dict(model.state_dict(), strict=True, assign=True)
    saved = model.state_dict(keep_vars=True).keys()
    for name, buffer in model.named_buffers():
        if name not in saved:
            path, _, leaf = name.rpartition(".")
            shell.get_submodule(path)._buffers[leaf] = buffer
    shell.tie_weights()
    shell.generation_config = _valid_generation_config(model)
    return True


def _logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits of the few tokens that transformers calls dummy inputs, in evaluation mode; shape (B, T, V)."""
    device = model.get_input_embeddings().weight.device
    inputs = {name: tensor.to(device) for name, tensor in model.dummy_inputs.items()}
    training = model.training
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs, use_cache=False).logits.float()
    model.train(training)
    return logits


def _agree(expected: torch.Tensor, shell: PreTrainedModel) -> bool:
    try:
        logits = _logits(shell)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    tolerance = 1e-5 if shell.dtype in (torch.float32, torch.float64) else 2e-2
    scale = float(expected.abs().max())
    return logits.shape == expected.shape and float((logits - expected).abs().max()) <= tolerance * max(scale, 1e-3)


def _check_weights(model: PreTrainedModel) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise CheckpointError(f"the model has no weights to save: {name} is on the meta device")
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # Smallest and largest value are NaN where any value is, and need no copy of the tensor.
        if not all(torch.isfinite(bound) for bound in torch.aminmax(tensor.detach())):
            raise CheckpointError(f"{name} holds NaN or infinite values; the model was not saved")


def _valid_generation_config(model: PreTrainedModel) -> Any:
    """Published models set sampling options without sampling, which cannot be saved; keep them and sample."""
    generation = copy.deepcopy(model.generation_config)
    if generation is not None:
        try:
            generation.validate(strict=True)
        except ValueError:
            generation.do_sample = True
    return generation


def _json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
