"""Saving a cut model as an ordinary Hugging Face directory, and loading it without remote code."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from .errors import CheckpointError, MissingExtraError, OutputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .families import ModelFamily

RECORD_FILE = "llmpruner.json"
_ADAPTER_FILE = "adapter_config.json"


def save_checkpoint(
    model: PreTrainedModel,
    directory: Path,
    *,
    record: Mapping[str, Any],
    tokenizer: Any | None = None,
    family: ModelFamily | None = None,
    extra_files: Sequence[Path] = (),
) -> Literal["stock", "shim"]:
    """Write ``model`` to the new ``directory`` and say in which form.

    *stock*: a configuration of transformers states it exactly; transformers alone loads it.
    *shim*: its layers differ, and the directory carries ``modeling_llmpruner.py``. Either form is rebuilt
    first, sharing the weights, and must give the same logits as ``model`` on its ``dummy_inputs``.

    ``record``: JSON values, written to ``llmpruner.json`` beside the weights.
    ``family``: asked for further stock configurations.
    ``extra_files``: copied into the directory. Code of a base class outside transformers needs no mention.

    Raises `OutputError` when ``directory`` exists or cannot be written, and `CheckpointError` for weights
    that are not finite and for a model that no configuration and record can state. Nothing is left behind.
    """
    if directory.exists():
        raise OutputError(f"{directory} exists already; choose another output directory or remove it")
    from .meta import quiet_transformers

    _check_weights(model)
    shell, form = _shell(model, family)
    text = _json(record)
    with _written_beside(directory) as partial:
        (partial / RECORD_FILE).write_text(text, encoding="utf-8")
        with quiet_transformers():
            # Other readers of a stock model expect transformers' original names (experts one by one).
            shell.save_pretrained(partial, save_original_format=form == "stock")
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
        for file in extra_files:
            shutil.copyfile(file, partial / file.name)
    return form


def read_record(path: str | Path) -> dict[str, Any] | None:
    """What `save_checkpoint` wrote to ``llmpruner.json``; None for a model that llmpruner did not write."""
    file = Path(path) / RECORD_FILE
    return _read_json(file) if file.is_file() else None


def load_pruned(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Load a checkpoint of `save_checkpoint`, stock or not, or a LoRA adapter upon one. No remote code runs.

    ``path``: a directory or a hub id. ``dtype``: as saved unless given. Any stock checkpoint loads as well.
    Raises `CheckpointError` when a file is missing or damaged, or a tensor is missing, unknown or misshapen.
    """
    base = adapter_base(Path(path))
    if base is not None:
        model = load_pruned(base, dtype=dtype, device=device, attn_implementation=attn_implementation)
        return cast("PreTrainedModel", with_adapter(model, Path(path)))
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise CheckpointError(f"{path} is no checkpoint: it has no config.json")
    from safetensors import SafetensorError

    from .meta import quiet_transformers

    options: dict[str, Any] = {"dtype": dtype or "auto", "use_safetensors": True, "output_loading_info": True}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        with quiet_transformers():
            model, info = _model_class(path).from_pretrained(str(path), **options)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {_one_line(error)}") from error
    for trouble in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        for key in sorted(map(str, info[trouble])):
            raise CheckpointError(f"the weights of {path} are incomplete or damaged: {trouble[:-5]} tensor {key}")
    return cast("PreTrainedModel", model.to(device).eval())


def save_adapter(model: Any, directory: Path, *, base: str, tokenizer: Any | None) -> None:
    """Write the adapters of a peft model alone; ``base`` is the model they are loaded onto.

    Raises `OutputError` when ``directory`` exists or cannot be written.
    """
    if directory.exists():
        raise OutputError(f"{directory} exists already; choose another output directory or remove it")
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    with _written_beside(directory) as partial:
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)


def adapter_base(path: Path) -> str | None:
    """The model that the peft adapter in directory ``path`` belongs to: a folder inside ``path``, or what the adapter
    names; None when ``path`` is no adapter. Raises `CheckpointError` when its file is damaged."""
    file = path / _ADAPTER_FILE
    if not file.is_file():
        return None
    base = _read_json(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{file} does not name the model that it adapts (base_model_name_or_path)")
    return str(path / base) if (path / base).is_dir() else base


def with_adapter(model: PreTrainedModel, path: Path) -> Any:
    """``model`` with the peft adapter in directory ``path`` upon it, as a peft model in evaluation mode.

    Raises `CheckpointError` when the adapter is damaged or belongs to another model.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtraError("peft", "recover") from error
    load: Callable[..., Any] = PeftModel.from_pretrained
    # A damaged adapter can raise anything, from the parser of its configuration to torch.
    try:
        return load(model, str(path)).eval()
    except Exception as error:
        base = model.config.name_or_path
        raise CheckpointError(f"the adapter in {path} does not fit '{base}': {_one_line(error)}") from error


def _shell(model: PreTrainedModel, family: ModelFamily | None) -> tuple[PreTrainedModel, Literal["stock", "shim"]]:
    """An instance of the class that will be saved, holding the weights of ``model``."""
    from .shim import shim_model, stock_config
    from .stock import stock_model

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
    from .stock import same_buffers

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
    import torch

    device = model.get_input_embeddings().weight.device
    inputs = {name: tensor.to(device) for name, tensor in model.dummy_inputs.items()}
    training = model.training
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs, use_cache=False).logits.float()
    model.train(training)
    return logits


def _agree(expected: torch.Tensor, shell: PreTrainedModel) -> bool:
    import torch

    try:
        logits = _logits(shell)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    tolerance = 1e-5 if shell.dtype in (torch.float32, torch.float64) else 2e-2
    scale = float(expected.abs().max())
    return logits.shape == expected.shape and float((logits - expected).abs().max()) <= tolerance * max(scale, 1e-3)


def _check_weights(model: PreTrainedModel) -> None:
    import torch

    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise CheckpointError(f"the model has no weights to save: {name} is on the meta device")
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # Smallest and largest carry NaN along, and need no copy of the tensor.
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


@contextmanager
def _written_beside(directory: Path) -> Iterator[Path]:
    """A new directory that becomes ``directory`` when all goes well and vanishes when not."""
    from safetensors import SafetensorError

    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            # safetensors makes its files private to their owner; the directory says what was meant.
            file.chmod(partial.stat().st_mode & 0o666)
        partial.rename(directory)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
        reason = "no space left on the device" if full else _one_line(error)
        raise OutputError(f"{directory} cannot be written: {reason}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _model_class(path: str | Path) -> Any:
    """The class that loads ``path``: a pruned one by its record, else AutoModel's choice."""
    from transformers import AutoModelForCausalLM, PreTrainedConfig

    from .modeling_llmpruner import MODEL_TYPE_PREFIX, base_class, pruned_model

    config, _ = PreTrainedConfig.get_config_dict(str(path))
    if str(config.get("model_type", "")).startswith(MODEL_TYPE_PREFIX):
        return pruned_model(base_class(config["llmpruner"]))
    return AutoModelForCausalLM


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {_one_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is damaged: expected a JSON object")
    return value


def _json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
