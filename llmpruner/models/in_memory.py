"""Loading a model with all its weights in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers import AutoModelForCausalLM

from ..settings import LoadSettings
from .adapters import adapter_base, with_adapter
from .complete import check_amount, check_files, check_loaded, check_number_types, check_shapes, check_ties
from .dtypes import dtype_in_memory
from .failures import in_one_line
from .load import load_pruned
from .manifest import check_weights
from .mixed import check_runs
from .model import Model, Structure
from .number_types import check_quantisation
from .quiet import quiet_gguf, quiet_transformers
from .reference import Reference, resolve
from .structure import adapted, load_structure
from .tokenizer import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..plugins.catalog import Catalog


def load_model(
    text: str, catalog: Catalog, options: LoadSettings | None = None, structure: Structure | None = None
) -> Model:
    """A model, pruned or not, with weights on ``options.device``, in evaluation mode.

    ``structure``: the result of `load_structure`, if it was called before. Raises `ModelError`,
    `UnsupportedModelError` or `CheckpointError`.
    """
    options = options or LoadSettings()
    base = adapter_base(Path(text))
    if base is not None:
        check_weights(Path(text))  # before the base is read
        loaded = load_model(base, catalog, options)
        merged = with_adapter(loaded.model, Path(text)).merge_and_unload().eval()
        return replace(adapted(loaded, text), model=merged)
    ref = resolve(text, catalog, revision=options.revision)
    with ref.parsed_once():
        structure = structure or load_structure(text, catalog, options)
        check_amount(structure)
        tokenizer = read_tokenizer(ref, options, structure.config)
        model = _read_model(ref, structure, options)
    check_number_types(ref, structure, model, options)
    model = model.to(options.device).eval()
    check_shapes(model, structure.graph, text)
    check_ties(ref, model, structure.graph)
    check_runs(text, model)
    return Model(**vars(structure), model=model, tokenizer=tokenizer)


def _read_model(ref: Reference, structure: Structure, options: LoadSettings) -> PreTrainedModel:
    dtype = dtype_in_memory(options, structure, ref)
    if structure.record is not None:
        return load_pruned(
            ref.directory, dtype=dtype, device=options.device, trust_remote_code=options.trust_remote_code
        )
    if ref.reader is not None:
        return ref.reader.read_model(ref.directory, dtype)
    check_quantisation(structure.config, ref.text)
    check_files(ref)
    with in_one_line(ref), quiet_gguf() if ref.gguf_file else quiet_transformers():
        model, info = AutoModelForCausalLM.from_pretrained(
            ref.location,
            dtype=dtype,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **ref.gguf_argument,
        )
    check_loaded(ref.text, model, info)
    if ref.gguf_file:
        forget_quantisation(model)
    return cast("PreTrainedModel", model)


def forget_quantisation(model: Any) -> None:
    """Remove the marks of quantisation from a dequantised model, which prevent training and saving."""
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
