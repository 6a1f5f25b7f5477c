"""Opening a model with its weights: in memory, or read from safetensors files layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoModelForCausalLM

from ..errors import ModelError
from ..settings import LoadSettings
from .checkpoint import load_pruned, with_adapter
from .gguf import forget_gguf, stored_twice
from .messages import from_pretrained, in_one_line
from .model import Model, Structure
from .numbers import dtype_of, stored_value
from .record import check_weights, has_shards, read_any_record
from .reference import Reference
from .tokenizer import load_tokenizer
from .weights import CheckpointWeights, tied_differ

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..structure.coupling import CouplingGraph

_LOG = logging.getLogger("llmpruner")


def load_model(structure: Structure, options: LoadSettings | None = None) -> Model:
    """The model of ``structure``, pruned or not, with weights on ``options.device``, in evaluation mode. An adapter is
    merged. Raises `ModelError`, `UnsupportedModelError` or `CheckpointError`."""
    options, ref = options or LoadSettings(), structure.place
    if structure.adapter is not None:
        check_weights(structure.adapter)  # before the base is read
    tokenizer = load_tokenizer(structure, options)
    model = _read_model(structure, options).to(options.device).eval()
    check_shapes(model, structure.graph, ref.text)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, other in structure.graph.ties.items():
        # transformers leaves them separate where the files hold both, with different values; a cut would keep one.
        if parameters[name] is not parameters[other]:
            raise tied_differ(ref.directory, name, other)
    if structure.adapter is not None:
        model = with_adapter(model, structure.adapter).merge_and_unload().eval()
    return Model(**vars(structure), model=model, tokenizer=tokenizer)


def _read_model(structure: Structure, options: LoadSettings) -> PreTrainedModel:
    ref, dtype = structure.place, dtype_of(structure, options)
    if structure.record is not None:
        return load_pruned(
            ref.directory, dtype=dtype, device=options.device, trust_remote_code=options.trust_remote_code
        )
    if ref.reader is not None:
        return ref.reader.read_model(ref.directory, dtype)
    check_files(ref)
    model, info = from_pretrained(
        AutoModelForCausalLM, ref, structure.revision, dtype=dtype, trust_remote_code=options.trust_remote_code,
        output_loading_info=True, ignore_mismatched_sizes=True,
    )  # fmt: skip
    check_loaded(ref.text, model, info)
    if ref.gguf_file:
        forget_gguf()
        forget_quantisation(model)
        if stored_twice(model):
            _LOG.warning(
                "'%s' holds its embedding twice, as the head in another quantisation: %.0f M parameters too many; "
                "export it by --to stock --set stock.tie=true, and take the result",
                ref.text, model.get_output_embeddings().weight.numel() / 1e6,
            )  # fmt: skip
    return cast("PreTrainedModel", model)


def forget_quantisation(model: Any) -> None:
    """Remove the marks of quantisation from a dequantised model, which prevent training and saving."""
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)


def open_streamed(structure: Structure, options: LoadSettings, scratch: Path | None = None) -> Model:
    """As `load_model`, for a model that `why_not_streamed` accepts: its weights stay in their files, and are read
    layer by layer. ``scratch``: see `CheckpointWeights`."""
    check_files(structure.place)
    tokenizer = load_tokenizer(structure, options)
    weights = open_weights(structure, options, scratch)
    return Model(**vars(structure), model=weights.model, tokenizer=tokenizer, streamed=weights)


def open_weights(structure: Structure, options: LoadSettings, scratch: Path | None = None) -> CheckpointWeights:
    """The weights of `open_streamed`; names, types and shapes of the stored tensors are checked."""
    ref, graph = structure.place, structure.graph
    with in_one_line(ref):
        weights = CheckpointWeights(
            ref.directory, dtype_of(structure, options), graph.layers, torch.device(options.device), scratch,
            trust_remote_code=options.trust_remote_code,
        )  # fmt: skip
    check_loaded(ref.text, weights.model, weights.info)
    check_shapes(weights.model, graph, ref.text)
    return weights


def reopened(pruned: Model, directory: Path, *, trust_remote_code: bool) -> Model:
    """``pruned``, whose weights were read from the files of the dense model, with those that it was saved with in
    ``directory``, read layer by layer too. ``pruned`` where this process does not see the directory."""
    if pruned.streamed is None or not (directory / "config.json").is_file():
        return pruned
    weights = CheckpointWeights(
        directory, pruned.model.dtype, pruned.graph.layers, pruned.streamed.device, directory.resolve().parent,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    return replace(pruned, model=weights.model, streamed=weights)


def why_not_streamed(structure: Structure, *, cuts: bool = True) -> str | None:
    """Why a model cannot be read layer by layer; None if it can. ``cuts``: whether it will be cut."""
    ref = structure.place
    shares = any(structure.graph.is_decoder(name) for name in structure.graph.ties)
    convert = f"convert it once by llmpruner export {structure.ref} --to stock -o DIR, and take DIR"
    reasons = {
        "it is an adapter, which is added to a model in memory": structure.adapter is not None,
        "it is not on this machine; download it first": not ref.directory.is_dir(),
        f"its weights are not in safetensors files; {convert}": (
            ref.gguf_file or (ref.reader is not None and structure.record is None) or not has_shards(ref.directory)
        ),
        "it was pruned before, and is loaded as a whole": cuts and bool(structure.plans),
        "it is quantised": stored_value(structure, "quantization_config") is not None,
        "its layers share parameters": shares,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def check_files(ref: Reference) -> None:
    """`check_weights`, for folders that llmpruner wrote. Indexes of other models are not always right."""
    if ref.directory.is_dir() and not ref.gguf_file and read_any_record(ref.directory) is not None:
        check_weights(ref.directory)


def check_loaded(text: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Raise `ModelError` for tensors that are missing, which transformers initializes randomly, of another shape, or of
    a module that does not use them (a bias without ``bias`` in the configuration). Tensors of modules that the model
    does not have (a second head, buffers of older versions) give a warning. ``info``: of ``from_pretrained``."""
    missing = sorted(map(str, info["missing_keys"]))
    # transformers adds both shapes to the name.
    wrong = sorted(key if isinstance(key, str) else str(key[0]) for key in info["mismatched_keys"])
    unexpected = sorted(map(str, info["unexpected_keys"]))
    modules = {path for path, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    unused = [key for key in unexpected if key.rpartition(".")[0] in modules]
    for keys, what in (
        (missing, "lacks tensor"),
        (wrong, "has in another shape than its configuration gives the tensor"),
        (unused, "has, for a module of the model that does not use it, the tensor"),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ModelError(f"the checkpoint of '{text}' {what} '{keys[0]}'{more}; it is incomplete or damaged")
    if unexpected:
        _LOG.warning("'%s': no module of the model for %d tensors (%s …)", text, len(unexpected), unexpected[0])


def check_shapes(model: PreTrainedModel, graph: CouplingGraph, text: str) -> None:
    """Raise `ModelError` for a parameter of another shape than ``graph`` gives. ``text``: the reference."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        expected = graph.shapes.get(name)
        if expected is None or tuple(parameter.shape) != expected:
            raise ModelError(
                f"'{text}': parameter '{name}' has shape {tuple(parameter.shape)}, its configuration gives {expected}"
            )
