"""Tiny models in files, and the same work on the CPU and on the stand-in, whose results must be equal."""

import contextlib
import json
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import stand_in
import tiny_models
import torch
from criteria_cases import correlated
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CONFIG_MAPPING

from llmpruner import Structure, api, load_catalog
from llmpruner.discovery import groups
from llmpruner.discovery.tiny import random_instance
from llmpruner.models import devices
from llmpruner.pruning.forecast import forecast
from llmpruner.settings import LoadSettings

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
EXPERTS = {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}

groups.discover_graph = tiny_models.remembered(groups.discover_graph)


@cache
def dense(name: str = "llama", **sizes: int) -> Structure:
    """A model in a folder, with its tokenizer."""
    sizes = {**SIZES, **(EXPERTS if name == "mixtral" else {}), **sizes}
    folder = Path.cwd() / f"{name}-{sizes['num_hidden_layers']}"
    correlated(random_instance(CONFIG_MAPPING[name](**sizes))).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return api.discover(folder)


catalog = cache(load_catalog)


@cache
def text() -> str:
    (file := Path.cwd() / "text.txt").write_text(tiny_models.TEXT * 20)
    return str(file)


@contextlib.contextmanager
def like_the_cpu(bfloat16: bool = False) -> Iterator[None]:
    """The CPU computes what the stand-in does: products in float32, or in bfloat16, and attention by its formula, where
    it has a kernel of its own."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        fits = "pruning.compensation.least_squares"
        for module in ("models.numbers", "models.weights", "engine.products", "engine.statistics", fits):
            stack.enter_context(mock.patch(f"llmpruner.{module}.multiplies_bfloat16_fast", lambda _: bfloat16))
        yield


def begin(*, float64: bool = True, bfloat16: bool = False, total: int = 1 << 40) -> Any:
    """`stand_in.start`, with what the program remembers of devices forgotten."""
    devices._has_float64.cache_clear()
    return stand_in.start(float64=float64, bfloat16=bfloat16, total=total)


def prune(
    model: Structure, output: str, device: str, *, streamed: bool = False, bfloat16: bool = False, **settings: Any
) -> Any:
    def expected(job: Any, structure: Any, opener: Any, _: Any, **options: Any) -> Any:
        whole = forecast(job, structure, opener, None, **options)
        return forecast(job, structure, opener, whole.computing - 1, **options) if streamed else whole

    with like_the_cpu(bfloat16), mock.patch("llmpruner.pruning.workspace.forecast", expected):
        pruned = api.prune(model, output=output, load=LoadSettings(device=device), catalog=catalog(), **settings)
    assert (pruned.streamed is not None) == streamed
    return pruned


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    return {name: value for file in Path(folder).glob("*.safetensors") for name, value in load_file(file).items()}


def differences(folder: str | Path, expected: str | Path) -> str:
    """Of the plans and the bytes of the weights of two results; empty where there are none."""
    ours, theirs = (json.loads(Path(each, "llmpruner.json").read_text()) for each in (folder, expected))
    if ours["plans"] != theirs["plans"]:
        return "another plan"
    weights, others = tensors(folder), tensors(expected)
    if weights.keys() != others.keys():
        return "other tensors"
    changed = [name for name, value in weights.items() if not torch.equal(value, others[name])]
    return f"{len(changed)} of {len(weights)} tensors differ: {changed[0]}" if changed else ""


def said(error: Exception) -> str:
    """An error in one line, with the program's last line before it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/llmpruner/" in frame.filename]
    place = f" at {frames[-1].filename.rpartition('/llmpruner/')[2]}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}: {str(error).splitlines()[0]}"
