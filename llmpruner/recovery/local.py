"""Training each layer alone toward the output of the dense layer. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ..component import ComponentSettings
from ..errors import UnsupportedModelError
from ..structure.coupling import HIDDEN
from .base import RecoveryJob, RecoveryStrategy, TrainingResult

if TYPE_CHECKING:
    from ..structure.coupling import CouplingGraph

_OTHERS = "use --strategy full, lora or distil"


class LocalStrategy(RecoveryStrategy):
    """Layer-wise reconstruction (He, Zhang, Sun, 2017, for channels of convolutions): one decoder layer after the other
    is trained to give the hidden states that the dense model has after the same layer.

    The loss of a layer is the mean over trained tokens of ‖ŷ − y‖² / ‖y‖², with ŷ and y the hidden states after the
    layer in the pruned and in the dense model: the norm of the next layer divides by ‖y‖, so every token counts alike.
    A hidden state counts as a trained token where the next token is one. Where layers were removed, the target of
    a layer is the output of the last removed layer after it (of the first one kept, those before it are covered too),
    so that it is trained to replace them. Embeddings, the final norm and the head stay as they are.

    Each layer is trained by AdamW, in float32, without dropout, and rounded to its dtype
    afterwards. Where that does not lower its loss (over all of the data or, from 16 micro-batches on, over every second
    to fourth of them), it keeps the weights that it had. Of the
    settings that all strategies share, ``epochs`` are passes of every layer over the data; ``max_steps`` is the sum
    over all layers, which share it equally, the first ones getting what remains; the learning rate rises and falls for
    every layer anew. Micro-batches are examples of similar length, taken in random order.
    """

    name = "local"
    by_layer = True
    needs_dense = True
    summary = "trains one layer after the other toward the dense layer's output; reads models larger than memory"

    class Settings(ComponentSettings):
        inputs: Literal["pruned", "dense"] = Field(
            "pruned",
            description="Inputs of a layer while it is trained: what the trained layers before it give (pruned), so "
            "that it corrects their errors, or the target of the layer before it (dense), as if there were none.",
        )

    settings: Settings

    def check(self, graph: CouplingGraph, cut: Collection[str]) -> None:
        if any(graph.is_decoder(name) for name in graph.ties):
            raise UnsupportedModelError(f"decoder layers that share weights cannot be trained one by one; {_OTHERS}")
        if HIDDEN in cut:
            raise UnsupportedModelError(
                "hidden channels were removed, so outputs of layers cannot be compared with those of the dense model; "
                f"{_OTHERS}"
            )

    def train(self, job: RecoveryJob) -> TrainingResult:
        from .layerwise import train_layers

        return train_layers(job, own_inputs=self.settings.inputs == "pruned")
