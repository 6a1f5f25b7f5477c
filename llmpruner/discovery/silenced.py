"""The reference for a cut: the dense model with the removed units silenced."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ..models.surgery import silence
from ..structure.coupling import EXPERT
from ..structure.kept import removed_modules
from .routes import ClosedRoutes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..structure.coupling import CouplingGraph
    from ..structure.kept import Kept


def silenced(model: PreTrainedModel, graph: CouplingGraph, kept: Kept) -> AbstractContextManager[object]:
    """Silence all units that ``kept`` leaves out of the dense ``model``, in place; it must run inside the result.

    Removed layers return their inputs, removed experts are not selected by routers, and of other units the weights
    that read them are zero (see `models.surgery.silence`).
    """
    for path in removed_modules(graph, kept):
        model.get_submodule(path).register_forward_hook(_identity_hook, with_kwargs=True)
    routed = {name: units for name, units in kept.items() if graph.by_name[name].kind == EXPERT}
    silence(model, graph, {n: u for n, u in kept.items() if n not in routed and not graph.by_name[n].modules})
    return ClosedRoutes(model, graph, routed) if routed else nullcontext()


def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """(B, T, V) for ``tokens`` (B, T), without a cache."""
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return result


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest expected value; infinite for other shapes or NaN."""
    if actual.shape != expected.shape or not bool(actual.isfinite().all()):
        return float("inf")
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def _identity_hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    entering = args[0] if args else kwargs["hidden_states"]
    return entering if isinstance(output, torch.Tensor) else (entering, *output[1:])
