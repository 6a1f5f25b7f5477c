"""The exceptions of llmpruner. Each message is one line, which the command line prints before it exits with code 2."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class LlmprunerError(Exception):
    """Base class. The message is one line: what is wrong, what was expected, what to do."""


class PluginError(LlmprunerError):
    """A plugin is broken, or what it registers breaks the rules of its hook."""


class UnknownNameError(PluginError):
    """No component of that name is registered; the message lists the nearest and all known names."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        super().__init__(f"unknown {kind} '{name}'{near(name, names) or '.'} Known: {', '.join(names) or 'none'}.")


class ModelError(LlmprunerError):
    """A model cannot be found, read or used."""


class UnsupportedModelError(ModelError):
    """The model can be read, but its structure is not understood, or the output format can't represent it."""


class CouplingError(LlmprunerError):
    """Coupled groups contradict the parameters of the model."""


class DataError(LlmprunerError):
    """Calibration, recovery or evaluation data is missing, empty or malformed."""


class SettingsError(LlmprunerError):
    """An option or setting is unknown, out of bounds, or contradicts another."""


class SelectionError(LlmprunerError):
    """The amount asked for cannot be reached under the constraints of the groups."""


class PlanError(LlmprunerError):
    """A pruning plan is malformed, or was made for another model."""


class CheckpointError(LlmprunerError):
    """A checkpoint is damaged or incomplete."""


class OutputError(LlmprunerError):
    """An output exists already, or cannot be written."""


class ProcessError(LlmprunerError):
    """Another process of a run of several has ended, or cannot be reached."""


class MissingExtraError(LlmprunerError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run in llmpruner's checkout: pip install '.[{extra}]'")


def no_bias(parameter: str) -> UnsupportedModelError:
    """The error for a weight without a bias to change."""
    return UnsupportedModelError(f"'{parameter}' has no bias to change; use --set prune.compensate=refit or none")


def no_tokenizer(model: str, consequence: str) -> ModelError:
    """``model``: as in "model 'name'"; ``consequence``: what cannot be done, and what to do."""
    return ModelError(f"{model} brings no tokenizer, so {consequence}")


def not_pruned(model: str) -> ModelError:
    """For a dense ``model`` in place of a pruned one."""
    return ModelError(f"'{model}' was not pruned by llmpruner, so no dense model is known for it; prune it first")


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Put ``place`` before the message of every `LlmprunerError`."""
    try:
        yield
    except LlmprunerError as error:
        error.args = (f"{place}: {error}",)
        raise


MEANT = {
    "heads": "attention", "neurons": "mlp", "ffn": "mlp", "blocks": "layer", "depth": "layer", "tokens": "vocabulary",
    "vocab": "vocabulary", "quantize": "export", "quantise": "export", "convert": "export",
    "--sparsity": "--ratio", "--amount": "--ratio", "--criterion": "--importance", "--dataset": "--data",
    "--format": "--to",
    "magnitude": "l2", "hf": "stock", "safetensors": "stock", "llama.cpp": "gguf", "ollama": "gguf", "sft": "full",
}  # fmt: skip
"""Names in use elsewhere → names here, of commands, of options and of their values."""
_TO_GGUF = "`llmpruner export MODEL --to gguf --set gguf.quant=q4_k_m`"
ELSEWHERE = {"kl": "--kl", "--quantize": _TO_GGUF, "--quantise": _TO_GGUF, "--quant": _TO_GGUF}
"""Names of what another option or command does."""


def near(name: str, known: Iterable[str]) -> str:
    """``; did you mean ratio?`` for the name in ``known`` that `MEANT` gives, or those spelled like it; or empty."""
    if instead := ELSEWHERE.get(name.lower()):
        return f"; use {instead}."
    known = sorted(known)
    other = MEANT.get(name.lower(), name.lower())
    names = [other] if other in known else difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(names)}?" if names else ""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its class where the message is empty."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    if "weights_only" in lines[0]:
        # torch's own message advises to run what is in the file.
        return "the file holds more than tensors, and is not read"
    shown = "".join(c if c.isprintable() else "�" for c in lines[0])
    return (shown if len(shown) <= 400 else f"{shown[:400]}…").rstrip(":")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or the device has no memory left: `MemoryError`, or what torch's allocators raise."""
    by_torch = isinstance(error, RuntimeError) and re.search("allocate memory|out of memory", str(error))
    return isinstance(error, MemoryError) or bool(by_torch)
