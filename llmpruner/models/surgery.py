"""Applying a plan to a model: removing units (`cut_tensors`), or setting to zero what they contribute (`silence`).

To *cut* units is to remove their indices from all tensors, which changes shapes. To *silence* them is to set weights to
zero so that they contribute nothing, without changing shapes. Both give the same outputs, up to rounding.

``kept`` maps group names to the units that stay; a group that is not named keeps all. The meta device works too.
"""

from __future__ import annotations

from functools import partial
from math import sqrt
from typing import TYPE_CHECKING

import torch

from ..errors import PlanError
from ..structure.coupling import LAYER, VOCABULARY, CouplingGraph, Role
from ..structure.kept import Kept, check_kept, kept_indices, layer_numbers, removed_layers, restrict
from .modeling_llmpruner import drop_layers, replace_tensor
from .vocabulary import renumber

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cut_tensors(model: PreTrainedModel, graph: CouplingGraph, kept: Kept) -> CouplingGraph:
    """Remove all units that ``kept`` leaves out, in place, and return the coupling graph of the cut model.

    Replaces parameters and buffers, updates the sizes that linear, embedding and norm modules store, rescales RMS norms
    over cut units so that the result equals the silenced model, deletes removed layers, renumbers tokens and layers.
    Other attributes, such as numbers of heads, are left to `discovery.cut`. Raises `PlanError` for invalid ``kept``."""
    check_kept(graph, kept)
    sizes = {model.get_submodule(name.rpartition(".")[0]): size for name, size in norms(graph, kept).items()}
    for module, (before, after, _) in sizes.items():
        for name in ("variance_epsilon", "eps", "epsilon"):
            if isinstance(epsilon := getattr(module, name, None), float):
                setattr(module, name, epsilon * before / after)
    for name, units in kept.items():
        if graph.by_name[name].kind == VOCABULARY:
            renumber(model, units, graph.by_name[name].units)
    values = CutValues(graph, kept)
    replaced: dict[int, torch.Tensor] = {}
    for name in (*graph.shapes, *graph.buffers):
        if values.changes(name):
            replace_tensor(model, name, partial(values.of, name), replaced)
    if removed_layers(graph, kept):
        drop_layers(model, graph.layers, list(layer_numbers(graph, kept)))
    return restrict(graph, kept)


def silence(model: PreTrainedModel, graph: CouplingGraph, kept: Kept) -> None:
    """Silence the units that ``kept`` leaves out, in place: zero the weights that consume them, and under a norm, those
    that produce them. Raises `PlanError` for layers, which zeros do not silence."""
    check_kept(graph, kept)
    for name, units in kept.items():
        group = graph.by_name[name]
        if group.kind == LAYER:
            raise PlanError(f"group '{name}' consists of whole layers, which cannot be silenced by zeros")
        removed = sorted(set(range(group.units)) - set(units))
        # A normalised query head whose query is zero still attends, to all positions alike: its output must go too.
        roles = {Role.PRODUCES, Role.CONSUMES} if group.is_normalized else {Role.CONSUMES}
        for span in (span for span in group.cut_spans if span.role in roles):
            path, _, leaf = span.parameter.rpartition(".")
            tensor = getattr(model.get_submodule(path), leaf)
            index = torch.tensor(span.indices(removed), dtype=torch.long, device=tensor.device)
            with torch.no_grad():
                tensor.index_fill_(span.axis, index, 0.0)


class CutValues:
    """The values that the tensors of a model have after a cut to ``kept``."""

    def __init__(self, graph: CouplingGraph, kept: Kept) -> None:
        self._cuts: dict[str, dict[int, list[int]]] = {}
        for (name, axis), index in kept_indices(graph, kept).items():
            self._cuts.setdefault(name, {})[axis] = index
        self._scales = {n: (sqrt(before / after), offset) for n, (before, after, offset) in norms(graph, kept).items()}

    def changes(self, name: str) -> bool:
        """Whether a tensor is cut or rescaled."""
        return name in self._cuts or name in self._scales

    @torch.no_grad()
    def of(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor``, the parameter or buffer ``name`` of the dense model, after the cut."""
        for axis, index in self._cuts.get(name, {}).items():
            tensor = tensor.index_select(axis, torch.tensor(index, dtype=torch.long, device=tensor.device))
        if name in self._scales:
            factor, offset = self._scales[name]
            # In 16 bits, a weight w has more digits than 1 + w.
            wide = tensor if tensor.dtype == torch.float64 else tensor.float()
            tensor = wide.add(offset).mul_(factor).sub_(offset).to(tensor.dtype)
        return tensor.contiguous()


def norms(graph: CouplingGraph, kept: Kept) -> dict[str, tuple[int, int, float]]:
    """Weight of an RMS norm → the number of its entries before and after the cut, of all groups together (a norm over
    all heads has spans of key/value and of query heads), and what is added to them."""
    spans = (span for name in kept for span in graph.by_name[name].spans_with(Role.NORM))
    offsets = {(span.parameter, span.axis): span.offset for span in spans}
    sizes: dict[str, tuple[int, int, float]] = {}
    for (name, axis), index in kept_indices(graph, kept).items():
        offset = offsets.get((name, axis), offsets.get((graph.ties.get(name, name), axis)))
        if offset is not None:
            sizes[name] = graph.shapes[name][axis], len(index), offset
    return sizes
