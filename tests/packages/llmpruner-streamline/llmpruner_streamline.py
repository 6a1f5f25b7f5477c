"""The layer selection of LLM-Streamline (Chen et al., 2024): the block of layers that changes the stream least."""

from __future__ import annotations

import torch
from pydantic import Field

from llmpruner import ComponentSettings, ImportanceCriterion, LlmprunerError, Signal, StreamStats, hookimpl


class Streamline(ImportanceCriterion):
    """1 − the highest mean cosine between the hidden states before and after a block of ``length`` consecutive layers,
    over all blocks that a layer is in. The layers of the best block score lowest, and all alike."""

    name = "streamline"
    summary = "for layers: 1 − mean cosine of the stream before and after the best block of n layers (LLM-Streamline)"
    needs = frozenset({Signal.STREAM_BLOCKS})

    class Settings(ComponentSettings):
        length: int = Field(2, ge=1, description="Layers of a block: as many as are to be removed.")

    settings: Settings

    def score_layers(self, stream: StreamStats) -> torch.Tensor:
        n, layers = self.settings.length, stream.cosine.shape[1]
        if n > layers:
            raise LlmprunerError(f"streamline looks for a block of {n} layers, and the model has {layers}")
        none = stream.cosine.new_full((n - 1,), -torch.inf)
        of_blocks = torch.cat([none, stream.cosine[n - 1, : layers - n + 1], none])
        return 1 - of_blocks.unfold(0, n, 1).amax(1)


@hookimpl
def llmpruner_importance_criteria() -> list[type[ImportanceCriterion]]:
    return [Streamline]
