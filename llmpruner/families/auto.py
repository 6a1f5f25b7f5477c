"""AutoFamily: any decoder, by discovery."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .family import ModelFamily

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


AUTO = "auto"


class AutoFamily(ModelFamily):
    """Any decoder: its structure is discovered by tracing, and every cut is proved on a small model. The family of
    every model that no other one matches."""

    name = AUTO
    summary = "any decoder: structure is discovered by tracing, and every cut is proved on a small model"

    def matches(self, config: PreTrainedConfig) -> bool:
        """Never: the catalog takes this family when no other one matches."""
        del config
        return False
