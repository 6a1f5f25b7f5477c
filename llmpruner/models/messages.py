"""What transformers and the code of models say: silenced, or as one sentence."""

from __future__ import annotations

import contextlib
import linecache
import logging as standard
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import modeling_gguf_pytorch_utils as reader
from transformers.utils import logging

from ..errors import LlmprunerError, first_line


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the warnings and progress bars of transformers, and accelerate's of weights that stay in files."""
    placing = standard.getLogger("accelerate.big_modeling")
    with contextlib.ExitStack() as before:
        before.callback(placing.setLevel, placing.level)
        placing.setLevel(standard.ERROR)
        before.callback(logging.set_verbosity, logging.get_verbosity())
        logging.set_verbosity_error()
        if logging.is_progress_bar_enabled():
            before.callback(logging.enable_progress_bar)
        logging.disable_progress_bar()
        yield


@contextlib.contextmanager
def quiet_gguf() -> Iterator[None]:
    """`quiet_transformers` for reading a GGUF file, whose progress bar ignores the setting of transformers."""
    own = vars(reader).get("tqdm")
    with quiet_transformers():
        if own is not None:
            reader.tqdm = logging.tqdm
        try:
            yield
        finally:
            if own is not None:
                reader.tqdm = own


_AROUND = Path(torch.__file__).parent, Path(__file__).parents[1]
"""Packages that call the code of a model, and are called by it: torch and this one."""


def where(error: BaseException, model: nn.Module | None = None) -> tuple[str, str]:
    """The statement that raised ``error``, of code outside torch and this package, and the path of the module that ran
    it.

    ``model``: None for the first module in the traceback. Both are empty where no module of it was running.
    """
    paths: dict[int, str] = {} if model is None else {id(m): path for path, m in model.named_modules()}
    statement, inside = "", ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        running = frame.f_locals.get("self")
        if model is None and isinstance(running, nn.Module):
            model = running
            paths = {id(m): path for path, m in model.named_modules()}
        path = paths.get(id(running))
        if path is not None:
            inside = path or type(model).__name__
        if inside and not any(map(Path(frame.f_code.co_filename).is_relative_to, _AROUND)):
            statement = linecache.getline(frame.f_code.co_filename, line).strip()
    return statement, inside


def why_it_stops(error: BaseException) -> str:
    """Why a cut model cannot run or be saved, as a sentence: with the statement of the model's code that stops."""
    if isinstance(error, LlmprunerError):
        return first_line(error)
    statement, inside = where(error)
    if not inside:
        return f"the cut model cannot be used: {first_line(error)[:200]}"
    if isinstance(error, RuntimeError):
        return f"the cut model cannot run: in {inside}, `{statement}` needs a size that the cut changed"
    return f"the cut model cannot run: in {inside}, `{statement}` stops with: {first_line(error)[:160]}"
