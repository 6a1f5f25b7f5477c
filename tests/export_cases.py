"""What exporters are given: tiny models, and the plans by which they were cut."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from checkpoint_cases import LLAMA, SIZES, cut_llama
from llmpruner_llama import LlamaFamily

from llmpruner import ModelFamily


@dataclass(frozen=True)
class Source:
    """A loaded checkpoint, as `ExportTask.loaded` gives it."""

    model: Any
    family: ModelFamily
    config: Any
    plans: Sequence[Any] = ()
    record: Mapping[str, Any] | None = None
    tokenizer: Any | None = None

    def load(self) -> Any:
        return self


def llama_source(name: str, dtype: torch.dtype = torch.float32) -> Source:
    """One of `checkpoint_cases.LLAMA`."""
    from transformers import LlamaConfig

    case = LLAMA[name]
    plans = [SimpleNamespace(kept=dict(case.kept))] if case.kept else []
    return Source(cut_llama(name, dtype), LlamaFamily(), LlamaConfig(**{**SIZES, **case.options}), plans, {})
