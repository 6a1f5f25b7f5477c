"""AutoFamily: any decoder, by discovery."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .family import ModelFamily

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


AUTO = "auto"


class AutoFamily(ModelFamily):
    """Any decoder: its structure is discovered by tracing, and every cut is verified on a small model. The catalog
    uses it when no other family matches."""

    name = AUTO
    summary = "any decoder: structure is discovered by tracing, and every cut is verified on a small model"

    def matches(self, config: PreTrainedConfig) -> bool:
        del config
        return False
