"""The weights of a cut model, computed from those of the dense model when they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..models.surgery import CutValues
from ..structure.kept import layer_numbers
from .weights import PassedParts, StreamedWeights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..structure.coupling import CouplingGraph
    from ..structure.kept import Kept


class CutWeights(StreamedWeights):
    """The weights of ``model``, which is a copy of the model of ``dense``, cut to ``kept``, with parameters on the meta
    device. ``graph``: of the dense model."""

    def __init__(self, model: PreTrainedModel, dense: StreamedWeights, graph: CouplingGraph, kept: Kept) -> None:
        super().__init__(_CutParts(model, dense, graph, kept), dense.path, dense.device)
        self._source = dense, graph, kept

    def like(self, model: PreTrainedModel) -> CutWeights:
        """The same weights for another model with the same parameters, on the meta device."""
        return CutWeights(model, *self._source)


class _CutParts(PassedParts):
    """The `Parts` of `CutWeights`."""

    def __init__(self, model: PreTrainedModel, dense: StreamedWeights, graph: CouplingGraph, kept: Kept) -> None:
        super().__init__(model, dense)
        self._values = CutValues(graph, kept)
        self._old: dict[int | None, int | None] = {new: old for old, new in layer_numbers(graph, kept).items()}
        self._old[None] = None

    def read(self, part: int | None) -> dict[str, torch.Tensor]:
        old, dense = self._old[part], self._source
        with dense.part(old):
            tensors = dense.model.state_dict()
            return {
                self._renamed(name, old, part): self._values.of(name, tensors[name])
                for name in tensors
                if dense.number(name) == old
            }

    def _renamed(self, name: str, old: int | None, new: int | None) -> str:
        path = self._source.path
        return name if old == new else f"{path}.{new}.{name.removeprefix(f'{path}.{old}.')}"
