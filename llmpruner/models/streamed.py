"""Opening a model whose weights stay in its files, and are read layer by layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..engine.weights import StreamedWeights
from ..settings import LoadSettings
from .adapters import adapter_base
from .complete import check_files, check_loaded, check_number_types, check_shapes
from .dtypes import dtype_in_memory
from .failures import in_one_line, naming_missing
from .lazy import LazyModel, lazy_checkpoint
from .mixed import check_runs
from .model import Model, Structure
from .reference import resolve
from .streamed_formats import format_conversion_rate, open_by_layer, why_format_is_not_streamed
from .tokenizer import read_tokenizer

if TYPE_CHECKING:
    from ..plugins.catalog import Catalog


def open_streamed(
    text: str,
    catalog: Catalog,
    options: LoadSettings,
    structure: Structure,
    beside: Path | None = None,
    *,
    ahead: bool = True,
    once: bool = False,
) -> Model:
    """As `load_model`, for a model that `why_not_streamed` accepts: its weights stay in their files, and are read part
    by part when they are needed. Tensors that are not stored as the model has them are converted into a temporary
    folder, in ``beside`` or where the system has such folders. ``ahead``: whether the next layer is read while one is
    in use. ``once``: values that take time to compute (of a GGUF file) are kept in such a folder in ``beside``, too."""
    ref = resolve(text, catalog, revision=options.revision)
    check_files(ref)
    with ref.parsed_once():
        tokenizer = read_tokenizer(ref, options, structure.config)
        lazy = lazily(text, catalog, options, structure, beside, once=once)
    lazy.reads_ahead = ahead
    streamed = StreamedWeights(lazy, structure.graph.layers, torch.device(options.device))
    check_runs(text, lazy.model, streamed)
    return Model(**vars(structure), model=lazy.model, tokenizer=tokenizer, streamed=streamed)


def lazily(
    text: str,
    catalog: Catalog,
    options: LoadSettings,
    structure: Structure,
    beside: Path | None = None,
    *,
    once: bool = False,
) -> LazyModel:
    """The model of `open_streamed` without weights, and what reads them; names and shapes are checked."""
    ref, graph = resolve(text, catalog, revision=options.revision), structure.graph
    dtype = dtype_in_memory(options, structure, ref)
    with in_one_line(ref), naming_missing(ref.directory, graph):
        lazy = open_by_layer(
            ref, ref.weights_reader(structure), structure.config, dtype, graph.layers, beside, once=once,
            trust_remote_code=options.trust_remote_code,
        )  # fmt: skip
    if lazy.info is not None:
        check_loaded(text, lazy.model, lazy.info)
    check_number_types(ref, structure, lazy.model, options)
    check_shapes(lazy.model, graph, text)
    return lazy


def reopened(pruned: Model, directory: Path, *, trust_remote_code: bool) -> Model:
    """``pruned``, whose weights were read from the files of the dense model, with those that it was saved with in
    ``directory``, which are read layer by layer too. Where this process does not see the directory, ``pruned``."""
    if pruned.streamed is None or not (directory / "config.json").is_file():
        return pruned
    path, beside = pruned.graph.layers, directory.resolve().parent
    lazy = lazy_checkpoint(directory, pruned.model.dtype, path, beside, trust_remote_code=trust_remote_code)
    return replace(pruned, model=lazy.model, streamed=StreamedWeights(lazy, path, pruned.streamed.device))


def why_not_streamed(
    text: str, catalog: Catalog, options: LoadSettings, structure: Structure, *, cuts: bool = True
) -> str | None:
    """Why a model cannot be read layer by layer; None if it can. ``cuts``: whether it will be cut."""
    if adapter_base(Path(text)) is not None:
        return "it is an adapter, which is added to a model in memory"
    ref = resolve(text, catalog, revision=options.revision)
    reason = why_format_is_not_streamed(ref, ref.weights_reader(structure))
    if reason is not None:
        return reason
    if cuts and structure.plans:
        return "it was pruned before, and is loaded as a whole"
    if getattr(structure.config, "quantization_config", None) is not None:
        return "it is quantised"
    if any(structure.graph.is_decoder(name) for name in structure.graph.ties):
        return "its layers share parameters"
    return None


def conversion_rate(structure: Structure, catalog: Catalog, options: LoadSettings) -> float | None:
    """Values per second that are computed of those in the files when a model is read layer by layer; None where tensors
    are mapped from the files as they are."""
    ref = resolve(structure.ref, catalog, revision=options.revision)
    return format_conversion_rate(ref, ref.weights_reader(structure))
