"""Saving a cut model as an ordinary Hugging Face directory: stock, or with a record of how it differs from stock."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from transformers import GenerationConfig

from ..errors import CheckpointError, UnsupportedModelError, is_out_of_memory
from ..files import new_directory, read_json
from .messages import quiet_transformers, why_it_stops
from .meta import base_of, empty_model
from .modeling_llmpruner import LAYERS, apply_record, derive_lists, layer_overrides, pruned_model
from .numbers import first_not_finite
from .record import INDEX_FILE, RECORD_FILE, WEIGHTS_FILE, names_in, write_record
from .stock import per_layer_sizes, plain_attributes, same_buffers, stock_model, tensor_shapes, uncut_model
from .weights import StreamedWeights, Weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from .family import ModelFamily

_NUMBERS = (int, float, bool)
_PLAIN = (*_NUMBERS, str, type(None))
_STOPS = (RuntimeError, ValueError, IndexError, TypeError)
"""What the code of a model raises for sizes that it was not made for."""


def save_checkpoint(
    model: PreTrainedModel,
    directory: Path,
    *,
    record: Mapping[str, Any] | None,
    tokenizer: Any | None = None,
    family: ModelFamily | None = None,
    stock_only: bool = False,
    parts: StreamedWeights | None = None,
) -> Literal["stock", "shim"]:
    """Write ``model`` to the new ``directory``; returns the form.

    *stock*: a configuration of transformers represents it exactly; transformers alone loads it.
    *shim*: its layers differ, and the directory contains ``modeling_llmpruner.py``. Before writing, the model is
    rebuilt from the configuration, sharing the weights, and must give the same logits on its ``dummy_inputs``.

    ``record``: JSON values for ``llmpruner.json``, which also gets the size and the SHA-256 of every file; None writes
    no such file. ``family``: may propose further stock configurations. ``stock_only``: raise `UnsupportedModelError`
    instead of writing a shim. ``parts``: the weights of a streamed ``model``; each part becomes a shard.

    Raises `OutputError` when ``directory`` exists and is not empty, or cannot be written, and `CheckpointError` for
    weights that are not finite and for a model that no configuration and record can state; no files remain then.
    """
    if parts is None:
        _check_finite(model.state_dict())
    weights = _rebuilt(model, family, parts or Weights(model, ""))
    rebuilt = weights.model
    form: Literal["stock", "shim"] = "shim" if hasattr(rebuilt, "pruned_base") else "stock"
    if stock_only and form != "stock":
        raise UnsupportedModelError(
            f"no configuration of transformers describes this {type(model).__name__} exactly, as a rule because its "
            "layers have different widths; prune with --shape uniform for a stock checkpoint, or export to a format "
            "with a width for each layer"
        )
    # With several processes, transformers writes weights in the first one alone; here, whoever calls writes.
    rebuilt.should_save_on_this_rank = lambda is_main_process: is_main_process
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()  # of an `ExportTask`
    with new_directory(directory) as partial:
        with quiet_transformers():
            # Other readers of a stock model expect transformers' original names (experts one by one).
            if isinstance(weights, StreamedWeights):
                _save_parts(weights, partial, original=form == "stock")
            else:
                rebuilt.save_pretrained(partial, save_original_format=form == "stock")
            if form == "stock":
                add_earlier_names(partial, rebuilt.config.attribute_map)
            if tokenizer is not None:
                save_tokenizer(tokenizer, partial)
        if record is not None:
            write_record(partial / RECORD_FILE, record)
    return form


def _save_parts(weights: StreamedWeights, directory: Path, *, original: bool) -> None:
    """`save_pretrained` with a shard for each part; one part is in memory at a time."""
    model, weight_map = weights.model, dict[str, str]()
    for position, number in enumerate(weights.numbers):
        aside = directory / "part"
        with weights.part(number):
            state = {n: t for n, t in model.state_dict().items() if weights.number(n) == number}
            _check_finite(state)
            model.save_pretrained(aside, state_dict=state, save_original_format=original, max_shard_size="1000GB")
        shard = f"model-{position + 1:05}-of-{len(weights.numbers):05}.safetensors"
        (aside / WEIGHTS_FILE).rename(directory / shard)
        weight_map |= dict.fromkeys(sorted(names_in(directory / shard)), shard)
        if position == 0:
            for file in aside.iterdir():
                file.rename(directory / file.name)
        shutil.rmtree(aside)
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _rebuilt(model: PreTrainedModel, family: ModelFamily | None, weights: Weights) -> Weights:
    """``weights`` of ``model`` in an instance of the class that will be saved, which gives the same logits."""
    config = stock_config(model)
    with weights.outside():  # by which the device is known, too
        try:
            expected = dummy_logits(model)
        except _STOPS as error:
            if is_out_of_memory(error):
                raise
            raise UnsupportedModelError(f"{why_it_stops(error)}; prune other kinds of units") from error
    of_layers = cache(partial(per_layer_sizes, model, config))
    if (stock := stock_model(model, config, family, of_layers)) is not None and _fill(stock, model):
        of_stock = weights.like(stock)
        with of_stock.outside():
            if gives_logits(expected, stock):
                return of_stock
    if not _fill(pruned := shim_model(model, config, of_layers()), model):
        lost = "buffers that a checkpoint cannot keep; they must be persistent"
        raise CheckpointError(f"{type(model).__name__} has {lost}")
    of_pruned = weights.like(pruned)
    with of_pruned.outside():
        if not gives_logits(expected, pruned):
            why = "something was changed that is neither a tensor nor a plain attribute of a module"
            raise CheckpointError(f"the rebuilt model gives other outputs than the cut {type(model).__name__}: {why}")
    return of_pruned


def shim_model(model: PreTrainedModel, config: PreTrainedConfig, sizes: dict[int, dict[str, int]]) -> PreTrainedModel:
    """A pruned class without weights, with the shapes and attributes of ``model``. ``sizes``: `per_layer_sizes`."""
    base = base_of(model)
    # The module of a class that was loaded from a checkpoint's code is named as in the original installation.
    earlier: Mapping[str, Any] = getattr(model.config, "llmpruner", None) or {}
    outside = getattr(transformers, base.__name__, None) is not base
    module = (earlier.get("module") or base.__module__) if outside else None
    record = {"version": 1, "base": base.__name__, "module": module, **derive(model, config)}
    pruned = pruned_model(base)
    values = {k: v for k, v in config.to_dict().items() if k != "model_type"}
    if (overrides := layer_overrides(config)) is not None:
        record["per_layer"] = overrides
    if sizes or overrides:
        values["per_layer_config"] = overrides or sizes
        # Configurations check sizes of all layers when they are read, also by programs that want only the tokenizer.
        values["allow_global_per_layer_attribute_access"] = True
    stored = pruned.config_class.from_dict({**values, "llmpruner": record})
    stored._attn_implementation = config._attn_implementation
    return empty_model(pruned, stored)


def derive(model: PreTrainedModel, config: PreTrainedConfig) -> dict[str, Any]:
    """The record for `apply_record` that turns an instance of ``config`` into ``model``. Raises `CheckpointError`."""
    built = uncut_model(model, config)
    before, after = tensor_shapes(built), tensor_shapes(model)
    # A cut buffer is saved even where the class itself computes it.
    before |= {name: () for name, _ in built.named_buffers() if name not in before and name in after}
    for name in sorted(before.keys() ^ after.keys()):
        whose = "configuration" if name in before else "model"
        raise CheckpointError(f"only the {whose} has the parameter '{name}'; they must describe the same layers")
    shapes = {name: list(shape) for name, shape in after.items() if before[name] != shape}
    apply_record(built, {"shapes": shapes})
    attributes: dict[str, dict[str, Any]] = {}
    configs: dict[str, dict[str, Any]] = {}
    modules, own = dict(built.named_modules()), dict(model.named_modules())
    exchanged = own.keys() - modules.keys()
    for path, module in ((path, module) for path, module in own.items() if path in modules):
        # A class that replaces modules while it runs does so again, so which mode it is in (text) is not stored.
        kinds = _NUMBERS if any(e.startswith(path and f"{path}.") for e in exchanged) else _PLAIN
        ours, theirs = plain_attributes(module, kinds), vars(modules[path])
        if changed := {n: v for n, v in ours.items() if theirs.get(n) != v}:
            attributes[path] = changed
        own_config = vars(module).get("config")
        if own_config is not None and own_config is not vars(model).get("config"):
            stored = _plain_values(modules[path].config)
            if changed := {n: v for n, v in _plain_values(own_config).items() if n in stored and stored[n] != v}:
                configs[path] = changed
    record = {"layers": vars(model).get(LAYERS), "shapes": shapes, "attributes": attributes, "configs": configs}
    return {key: value for key, value in record.items() if value}


def _plain_values(config: Any) -> dict[str, Any]:
    return {n: v for n, v in vars(config).items() if not n.startswith("_") and isinstance(v, _NUMBERS)}


def stock_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The dense configuration of ``model``, without quantisation and records of cuts."""
    config = copy.deepcopy(model.config)
    derive_lists(config.get_text_config())
    if hasattr(model, "pruned_base"):
        dropped = {"model_type", "llmpruner", "auto_map", "per_layer_config", "allow_global_per_layer_attribute_access"}
        values = {k: v for k, v in config.to_dict().items() if k not in dropped}
        if "per_layer" in config.llmpruner:
            values["per_layer_config"] = config.llmpruner["per_layer"]
        config = model.pruned_base.config_class.from_dict(values)
        config._attn_implementation = model.config._attn_implementation
    vars(config).pop("quantization_config", None)
    return config


def _fill(rebuilt: PreTrainedModel, model: PreTrainedModel) -> bool:
    """Share all tensors of ``model`` with ``rebuilt``; False when buffers that are not saved differ."""
    if not same_buffers(model, rebuilt):
        return False
    rebuilt.load_state_dict(model.state_dict(), strict=True, assign=True)
    saved = model.state_dict(keep_vars=True).keys()
    for name, buffer in model.named_buffers():
        if name not in saved:
            path, _, leaf = name.rpartition(".")
            rebuilt.get_submodule(path)._buffers[leaf] = buffer
    rebuilt.tie_weights()
    rebuilt.generation_config = valid_generation_config(model)
    return True


def dummy_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits (B, T, V) of ``model.dummy_inputs``, a few tokens."""
    device, training = model.get_input_embeddings().weight.device, model.training
    inputs = {name: tensor.to(device) for name, tensor in model.dummy_inputs.items()}
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs, use_cache=False).logits.float()
    model.train(training)
    return logits


def gives_logits(expected: torch.Tensor, model: PreTrainedModel) -> bool:
    """Whether `dummy_logits` of ``model`` differ from ``expected`` by at most 1e-5 (16-bit weights: 2e-2) of the
    largest logit. False for a model that cannot compute them, unless for want of memory, which is raised."""
    try:
        logits = dummy_logits(model)
    except _STOPS as error:
        if is_out_of_memory(error):
            raise
        return False
    tolerance = 1e-5 if model.dtype in (torch.float32, torch.float64) else 2e-2
    scale = float(expected.abs().max())
    return logits.shape == expected.shape and float((logits - expected).abs().max()) <= tolerance * max(scale, 1e-3)


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Also writes ``tokenizer.model`` of SentencePiece: a fast tokenizer does not, and other formats need it."""
    tokenizer.save_pretrained(directory)
    file = Path(str(getattr(tokenizer, "vocab_file", None) or ""))
    if file.name == "tokenizer.model" and file.is_file():
        shutil.copyfile(file, directory / file.name)


def _check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    if damaged := first_not_finite(tensors.items()):
        raise CheckpointError(f"{damaged} holds NaN or infinite values; the model was not saved")


def valid_generation_config(model: PreTrainedModel) -> GenerationConfig | None:
    """The generation configuration in a form that transformers saves: published models set sampling options without
    ``do_sample``, and a padding token of -1. Where nothing else helps, its special tokens alone."""
    if (generation := copy.deepcopy(model.generation_config)) is None:
        return None
    tokens = {name: getattr(generation, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tokens = {name: None if isinstance(value, int) and value < 0 else value for name, value in tokens.items()}
    vars(generation).update(tokens)
    sampling = copy.deepcopy(generation)
    sampling.do_sample = True
    for candidate in (generation, sampling):
        with contextlib.suppress(Exception):  # values of any type, of which it expects some
            candidate.validate(strict=True)
            return candidate
    return GenerationConfig(**tokens)


def add_earlier_names(directory: Path, attribute_map: Mapping[str, str]) -> None:
    """State rotary embedding and number of experts by the earlier names too, for programs that know no others."""
    file = directory / "config.json"
    config = read_json(file)
    names = {name: config[own] for name, own in attribute_map.items() if own == "num_local_experts" and own in config}
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        names |= {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        if rope.get("rope_type", "default") != "default":
            names["rope_scaling"] = rope
    file.write_text(json.dumps({**config, **names}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
