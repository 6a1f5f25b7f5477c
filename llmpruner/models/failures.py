"""What transformers raises for missing or damaged models, as errors of one line."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, LlmprunerError, MissingExtraError, ModelError, first_line, reason_of
from .reference import Reference
from .remote import ALLOW
from .shards import check_index, names_in

if TYPE_CHECKING:
    from ..structure.coupling import CouplingGraph


@contextlib.contextmanager
def in_one_line(ref: Reference, damaged: Callable[[Path], str | None] | None = None) -> Iterator[None]:
    """Convert exceptions of transformers for missing or damaged models to `ModelError` with one line. ``damaged``:
    finds the damaged file in a directory and says what is wrong with it; by default among the files with weights."""
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
        what = "" if known else ": neither a directory, a .gguf file, 'demo', nor a hub id within reach"
        local = not ref.gguf_file and ref.reader is None
        named = ((damaged or _damaged_weights)(ref.directory) if local else None) or reason_of(error)
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
