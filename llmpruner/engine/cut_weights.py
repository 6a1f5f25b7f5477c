"""The weights of a cut model, computed from those of the dense model when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..models.empty import put_parameters
from ..models.surgery import CutValues
from ..structure.kept import layer_numbers
from .weights import StreamedWeights

if TYPE_CHECKING:
    import torch
    from torch import nn
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


class _CutParts:
    """The `Parts` of `CutWeights`."""

    reads_ahead = False

    def __init__(self, model: PreTrainedModel, dense: StreamedWeights, graph: CouplingGraph, kept: Kept) -> None:
        self.model = model
        self._dense = dense
        self._values = CutValues(graph, kept)
        self._old: dict[int | None, int | None] = {new: old for old, new in layer_numbers(graph, kept).items()}
        self._old[None] = None
        self._parts: dict[int | None, dict[str, nn.Parameter]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._parts.setdefault(dense.number(name), {})[name] = parameter

    def read(self, part: int | None) -> dict[str, torch.Tensor]:
        old, dense = self._old[part], self._dense
        with dense.part(old):
            tensors = dense.model.state_dict()
            return {
                self._renamed(name, old, part): self._values.of(name, tensors[name])
                for name in tensors
                if dense.number(name) == old
            }

    def fill(self, part: int | None, tensors: Mapping[str, torch.Tensor]) -> None:
        # Persistent buffers are among them.
        self.model.load_state_dict(dict(tensors), strict=False, assign=True)
        if part is None:
            self.model.tie_weights()

    def empty(self, part: int | None) -> None:
        put_parameters(self.model, self._parts[part])

    def _renamed(self, name: str, old: int | None, new: int | None) -> str:
        path = self._dense.path
        return name if old == new else f"{path}.{new}.{name.removeprefix(f'{path}.{old}.')}"
