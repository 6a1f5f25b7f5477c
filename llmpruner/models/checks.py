"""Checks of a model: before its weights are read, and after it was built."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import try_to_load_from_cache

from ..errors import (
    CheckpointError,
    LlmprunerError,
    MissingExtraError,
    ModelError,
    first_line,
)
from ..settings import LoadSettings
from ..values import counted
from .record import check_weights, read_any_record
from .reference import Reference
from .remote import ALLOW
from .shards import check_index, names_in, opened
from .weights import tied_differ

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..structure.coupling import CouplingGraph
    from .model import Structure


@contextlib.contextmanager
def in_one_line(ref: Reference) -> Iterator[None]:
    """Convert exceptions of transformers for missing or damaged models to `ModelError` with one line."""
    try:
        yield
    except LlmprunerError:
        raise
    except ImportError as error:
        if "gguf" in str(error).lower():
            raise MissingExtraError("gguf", "gguf") from error
        raise ModelError(f"cannot load model '{ref.text}': {first_line(error)}") from error
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelError(f"'{ref.text}' needs code that the checkpoint brings; {ALLOW}") from error
        known = ref.directory.exists()
        what = "" if known else ": no such directory or .gguf file, and the hub has no such model, or can't be reached"
        local = not ref.gguf_file and ref.reader is None
        named = (_damaged_weights(ref.directory) if local else None) or first_line(error)
        raise ModelError(f"cannot load model '{ref.text}'{what} ({named})") from error


@contextlib.contextmanager
def naming_missing(directory: Path, graph: CouplingGraph) -> Iterator[None]:
    """Name the missing tensor of safetensors files, at which accelerate stops without naming it."""
    try:
        yield
    except ValueError as error:
        if "meta device" not in str(error):
            raise
        stored = check_index(directory)
        missing = sorted(graph.shapes.keys() - graph.ties.keys() - stored.keys())
        if not missing or stored.keys() - graph.shapes.keys() - graph.buffers.keys():
            raise
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"the checkpoint of '{directory}' lacks tensor '{missing[0]}'{more}; it is incomplete or damaged"
        ) from error


def _damaged_weights(directory: Path) -> str | None:
    """What is wrong with the first safetensors file that cannot be opened, which transformers does not name; None where
    all can."""
    for file in sorted(directory.glob("*.safetensors")):
        try:
            names_in(file)
        except CheckpointError as error:
            return str(error)
    return None


_LOG = logging.getLogger("llmpruner")


def check_files(ref: Reference) -> None:
    """`check_weights`, for folders that llmpruner wrote. Indexes of other models are not always right."""
    if ref.directory.is_dir() and not ref.gguf_file and read_any_record(ref.directory) is not None:
        check_weights(ref.directory)


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
    """Raise `CheckpointError` for a weight that the safetensors files of a model which is not quantised store as whole
    numbers: loading casts what it reads, so that packed weights without their scales would pass for weights. Reads
    headers alone."""
    if getattr(model, "hf_quantizer", None) is not None or ref.gguf_file or ref.weights_reader(structure) is not None:
        return
    directory = ref.directory
    if not directory.is_dir():
        cached = try_to_load_from_cache(ref.location, "config.json", revision=options.revision)
        if not isinstance(cached, str):
            return
        directory = Path(cached).parent
    weights = {name for name, value in model.named_parameters(remove_duplicate=False) if value.is_floating_point()}
    prefix = f"{model.base_model_prefix}."
    for file in sorted(directory.glob("*.safetensors")):
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                kind = tensors.get_slice(name).get_dtype()
                # Buffers of older versions (masks) are whole numbers. Converted tensors have other names.
                known = name.endswith(".weight") or {name, prefix + name, name.removeprefix(prefix)} & weights
                if known and not kind.startswith(("F", "BF")):
                    raise CheckpointError(
                        f"{file}: tensor '{name}' is stored as {kind}, as in a quantised model, and transformers knows "
                        "no quantisation of this one; download it again, or restore quantization_config"
                    )
