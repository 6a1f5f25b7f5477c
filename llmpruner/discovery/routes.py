"""The reference for removed experts: the whole model, with routers that cannot select them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from ..structure.coupling import CouplingGraph, Role
from ..structure.kept import Kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ClosedRoutes(TorchFunctionMode):
    """While active, routers do not select the removed experts: their logits are minus infinity, as are their scores in
    top-k selections, as a sigmoid and a bias may have been applied in between."""

    def __init__(self, model: PreTrainedModel, graph: CouplingGraph, kept: Kept) -> None:
        super().__init__()
        self.closed: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}
        self.current: tuple[torch.Tensor, int] | None = None
        for name, units in kept.items():
            group = graph.by_name[name]
            removed = [u for u in range(group.units) if u not in set(units)]
            for span in group.spans_with(Role.PRODUCES):
                parameter = model.get_parameter(span.parameter)
                if parameter.ndim == 2 and span.axis == 0:
                    rows = torch.tensor(span.indices(removed))
                    self.closed[id(parameter)] = rows, torch.tensor(removed), group.units

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, torch.Tensor.topk) and self.current is not None:
            experts, number = self.current
            if args and number in (args[0].shape[-1], args[0].shape[1:].numel()):  # in groups, or not
                flat = args[0].reshape(-1, number).index_fill(-1, experts, float("-inf"))
                args = (flat.view(args[0].shape), *args[1:])
        result = func(*args, **kwargs)
        if self.closed and func is torch.nn.functional.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            closed = self.closed.get(id(weight))
            if closed is not None:
                rows, experts, number = closed
                result = result.index_fill(-1, rows, float("-inf"))
                self.current = experts, number
        return result
