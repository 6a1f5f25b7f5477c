"""Calls of transformers, and what it and the code of models say: silenced, or as one sentence."""

from __future__ import annotations

import contextlib
import linecache
import struct
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import logging

from ..errors import CheckpointError, LlmprunerError, MissingExtraError, ModelError, first_line, is_out_of_memory
from ..progress import only_errors
from .gguf import gguf_parsed_once
from .record import names_in

if TYPE_CHECKING:
    from .reference import Reference

ALLOW = "allow it with --trust-remote-code (trust_remote_code=True) if you trust it"
"""End of the messages that refuse to run code of a checkpoint. transformers asks on the terminal where its argument
``trust_remote_code`` is not given, so every call of its auto classes gives it."""


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the warnings and progress bars of transformers, and accelerate's of weights that stay in files."""
    with only_errors("accelerate.big_modeling"), contextlib.ExitStack() as before:
        before.callback(logging.set_verbosity, logging.get_verbosity())
        logging.set_verbosity_error()
        if logging.is_progress_bar_enabled():
            before.callback(logging.enable_progress_bar)
        logging.disable_progress_bar()
        yield


def where(error: BaseException, model: nn.Module | None = None) -> tuple[str, str]:
    """The statement of a model's code that raised ``error``, and the path of its module; empty without one."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if model is None:
        running = (frame.f_locals.get("self") for frame, _ in frames)
        model = next((module for module in running if isinstance(module, nn.Module)), None)
    modules = () if model is None else model.named_modules()
    paths = {id(module): path or type(model).__name__ for path, module in modules}
    skipped = Path(torch.__file__).parent, Path(__file__).parents[1]
    statement, inside = "", ""
    for frame, line in frames:
        inside = paths.get(id(frame.f_locals.get("self")), inside)
        if inside and not any(map(Path(frame.f_code.co_filename).is_relative_to, skipped)):
            statement = linecache.getline(frame.f_code.co_filename, line).strip()
    return statement, inside


def why_it_stops(error: BaseException) -> str:
    """Why a cut model cannot run or be saved, as a sentence with the statement of its code that stops."""
    if isinstance(error, LlmprunerError):
        return first_line(error)
    statement, inside = where(error)
    if not inside:
        return f"the cut model cannot be used: {first_line(error)[:200]}"
    if isinstance(error, RuntimeError):
        return f"the cut model cannot run: in {inside}, `{statement}` needs a size that the cut changed"
    return f"the cut model cannot run: in {inside}, `{statement}` stops with: {first_line(error)[:160]}"


@contextlib.contextmanager
def in_one_line(reference: Reference) -> Iterator[None]:
    """Turn errors of transformers or of a reader, for a missing or damaged model, into a `ModelError` of one line."""
    try:
        yield
    except LlmprunerError:
        raise
    except Exception as error:
        if is_out_of_memory(error):  # the command says what helps
            raise
        if isinstance(error, struct.error):  # of a GGUF file
            raise CheckpointError(f"{reference.ref} is truncated; download or write it again") from error
        if isinstance(error, ImportError) and "gguf" in str(error).lower():
            raise MissingExtraError("gguf", "gguf") from error
        if "trust_remote_code" in str(error):
            raise ModelError(f"'{reference.ref}' needs code that the checkpoint brings; {ALLOW}") from error
        if "meta device" in str(error):  # accelerate does not name them
            lacks = f"the checkpoint of '{reference.ref}' lacks tensors"
            raise ModelError(f"{lacks}; it is incomplete or damaged") from error
        if not reference.gguf_file and reference.reader is None:
            # transformers does not name a damaged file.
            for file in sorted(reference.directory.glob("*.safetensors")):
                names_in(file)
        known = reference.directory.exists()
        what = "" if known else ": no such directory or .gguf file, and the hub has no such model, or can't be reached"
        raise ModelError(f"cannot load model '{reference.ref}'{what} ({first_line(error)})") from error


def from_pretrained(auto_class: Any, reference: Reference, **options: Any) -> Any:
    """What transformers reads, silently and with exceptions in one line. A GGUF file is parsed once."""
    gguf = {"gguf_file": reference.gguf_file} if reference.gguf_file else {}
    with in_one_line(reference), quiet_transformers(), gguf_parsed_once() if gguf else contextlib.nullcontext():
        return auto_class.from_pretrained(reference.location, revision=reference.commit, **gguf, **options)
