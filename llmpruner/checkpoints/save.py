"""Saving a cut model as an ordinary Hugging Face directory."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..errors import CheckpointError, UnsupportedModelError
from ..files import new_directory
from ..models.quiet import quiet_transformers
from .record import RECORD_FILE
from .shim import shim_model, stock_config
from .stock import same_buffers, stock_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..structure.architecture import StatesConfigs


def save_checkpoint(
    model: PreTrainedModel,
    directory: Path,
    *,
    record: Mapping[str, Any] | None,
    tokenizer: Any | None = None,
    family: StatesConfigs | None = None,
    extra_files: Sequence[Path] = (),
    stock_only: bool = False,
) -> Literal["stock", "shim"]:
    """Write ``model`` to the new ``directory``; returns the form.

    *stock*: a configuration of transformers represents it exactly; transformers alone loads it.
    *shim*: its layers differ, and the directory contains ``modeling_llmpruner.py``. Before writing, the model is
    rebuilt from the configuration, sharing the weights, and must give the same logits as ``model`` on its
    ``dummy_inputs``.

    ``record``: JSON values, written to ``llmpruner.json`` beside the weights; None writes no such file.
    ``family``: may propose further stock configurations.
    ``extra_files``: copied into the directory. Code of a base class outside transformers needs no mention.
    ``stock_only``: raise `UnsupportedModelError` instead of writing a shim.

    Raises `OutputError` when ``directory`` exists or cannot be written, and `CheckpointError` for weights
    that are not finite and for a model that no configuration and record can state. ``directory`` does not exist then.
    """
    _check_weights(model)
    shell, form = _shell(model, family)
    if stock_only and form != "stock":
        raise UnsupportedModelError(
            f"no configuration of transformers describes this {type(model).__name__} exactly, as a rule because its "
            "layers have different widths; a stock checkpoint needs one width for all layers (prune with --unit-ratio "
            "and --layers all), or load this one with llmpruner"
        )
    text = None if record is None else _json(record)
    with new_directory(directory) as partial:
        if text is not None:
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
    expected = dummy_logits(model)
    stock = stock_model(model, config, family)
    if stock is not None and _fill(stock, model) and gives_logits(expected, stock):
        return stock, "stock"
    pruned = shim_model(model, config)
    if not _fill(pruned, model):
        raise CheckpointError(
            f"{type(model).__name__} has buffers that a checkpoint cannot keep; they must be persistent"
        )
    if not gives_logits(expected, pruned):
        raise CheckpointError(
            f"the rebuilt model gives other outputs than the cut {type(model).__name__}: "
            "something was changed that is neither a tensor nor a plain attribute of a module"
        )
    return pruned, "shim"


def _fill(shell: PreTrainedModel, model: PreTrainedModel) -> bool:
    """Let ``shell`` share all tensors of ``model``; False when buffers that are not saved differ."""
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


def dummy_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits (B, T, V) of ``model.dummy_inputs``, a few tokens, in evaluation mode."""
    device = model.get_input_embeddings().weight.device
    inputs = {name: tensor.to(device) for name, tensor in model.dummy_inputs.items()}
    training = model.training
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs, use_cache=False).logits.float()
    model.train(training)
    return logits


def gives_logits(expected: torch.Tensor, model: PreTrainedModel) -> bool:
    """Whether `dummy_logits` of ``model`` differ from ``expected`` by at most 1e-5 (16-bit weights: 2e-2) of the
    largest logit. False for a model that cannot compute them."""
    try:
        logits = dummy_logits(model)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    tolerance = 1e-5 if model.dtype in (torch.float32, torch.float64) else 2e-2
    scale = float(expected.abs().max())
    return logits.shape == expected.shape and float((logits - expected).abs().max()) <= tolerance * max(scale, 1e-3)


def vocabulary_files(tokenizer: Any | None) -> list[Path]:
    """``tokenizer.model`` of a SentencePiece tokenizer: a fast one does not save it, and other formats need it."""
    file = Path(str(getattr(tokenizer, "vocab_file", None) or ""))
    return [file] if file.name == "tokenizer.model" and file.is_file() else []


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
    """The generation configuration; with ``do_sample`` where published models set sampling options without it, which
    transformers refuses to save."""
    generation = copy.deepcopy(model.generation_config)
    if generation is not None:
        try:
            generation.validate(strict=True)
        except ValueError:
            generation.do_sample = True
    return generation


def _json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
