"""Whether the files of a model are complete, and hold the tensors that its configuration describes.

`check_files` and `check_amount` come before weights are read, the others after the model was built.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import try_to_load_from_cache

from ..amounts import counted
from ..errors import ModelError
from ..settings import LoadSettings
from .lazy import tied_differ
from .manifest import check_weights
from .number_types import check_stored_types
from .record import read_any_record
from .reference import Reference
from .shards import WEIGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..structure.coupling import CouplingGraph
    from .model import Structure

_LOG = logging.getLogger("llmpruner")
_WEIGHTS = {*WEIGHTS, ".pth"}
_LEAST_BYTES = 0.1
"""Of a parameter in a file; the smallest types of GGUF have 0.2."""


def check_files(ref: Reference) -> None:
    """`check_weights`, for folders that llmpruner wrote. Indexes of other models are not always right."""
    if ref.directory.is_dir() and not ref.gguf_file and read_any_record(ref.directory) is not None:
        check_weights(ref.directory)


def check_amount(structure: Structure) -> None:
    """Raise `ModelError` for local files that are far too small for the parameters of the configuration: such a model
    would be allocated before its shapes are compared."""
    stored, parameters = _file_bytes(structure), structure.graph.total_parameters
    if 0 < stored < _LEAST_BYTES * parameters:
        raise ModelError(
            f"the configuration of '{structure.ref}' is of {parameters:,} parameters, and the weight files have "
            f"{stored:,} bytes; one of both is damaged"
        )


def _file_bytes(structure: Structure) -> int:
    """Bytes of a model's local weight files; 0 for other models."""
    if structure.path is None:
        return 0
    path = Path(structure.path)
    files = [path] if path.is_file() else [file for file in path.glob("*") if file.suffix in _WEIGHTS]
    return sum(file.stat().st_size for file in files)


def check_loaded(text: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Check that a checkpoint was complete: transformers initializes missing tensors randomly.

    ``info``: the loading info of ``from_pretrained``. Raises `ModelError` for tensors that are missing or have another
    shape, and for those of modules of the model that do not use them (a bias without ``bias`` in the configuration).
    Tensors of modules that the model does not have (a second head, buffers of older versions) give a warning.
    """
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
        belong, were = ("belongs", "was") if len(unexpected) == 1 else ("belong", "were")
        _LOG.warning(
            "%s of '%s' %s to no module of the model and %s left out (%s …)",
            counted(len(unexpected), "tensor"), text, belong, were, unexpected[0],
        )  # fmt: skip


def check_shapes(model: PreTrainedModel, graph: CouplingGraph, text: str) -> None:
    """Raise `ModelError` for a parameter of another shape than ``graph`` gives. ``text``: the reference."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        expected = graph.shapes.get(name)
        if expected is None or tuple(parameter.shape) != expected:
            raise ModelError(
                f"'{text}': parameter '{name}' has shape {tuple(parameter.shape)}, its configuration gives {expected}"
            )


def check_ties(ref: Reference, model: PreTrainedModel, graph: CouplingGraph) -> None:
    """Raise `CheckpointError` where two parameters that are tied in ``graph`` are separate in ``model``: transformers
    leaves them so where the files hold both, with different values. A cut would keep only one of them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, other in graph.ties.items():
        if parameters[name] is not parameters[other]:
            raise tied_differ(ref.directory, name, other)


def check_number_types(ref: Reference, structure: Structure, model: PreTrainedModel, options: LoadSettings) -> None:
    """`check_stored_types`, for files in the formats of transformers that are not quantised."""
    configs = structure.config, model.config
    quantised = any(getattr(config, "quantization_config", None) is not None for config in configs)
    if quantised or ref.gguf_file or ref.weights_reader(structure) is not None:
        return
    directory = ref.directory
    if not directory.is_dir():
        found = try_to_load_from_cache(ref.location, "config.json", revision=options.revision)
        if not isinstance(found, str):
            return
        directory = Path(found).parent
    check_stored_types(directory, model)
