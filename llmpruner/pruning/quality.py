"""What a prune costs: predictions of the pruned model next to those of the dense one, on text of the calibration's
sources with which nothing was scored or fitted. Of the dense model, what its head reads is kept, far less than its
logits; those of both are computed after the cut by the pruned model without its layers, which scales and caps them.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from math import isfinite
from typing import Any, NamedTuple

import torch

from ..engine.execution import Execution
from ..engine.statistics import divergences
from ..engine.walk import CalibrationSet, Stop, as_output, hidden_of, replaced_layers
from ..models.devices import doubled
from ..models.generation import LOGIT_ELEMENTS
from ..models.model import Model
from ..models.numbers import with_fast_products
from ..models.tokenizer import predicted_tokens
from ..structure.coupling import LAYER
from ..structure.outcome import Quality
from ..structure.plan import PruningPlan
from .job import Job

RUN = 16
"""A token counts where it and those before it, so many in all, are nowhere in the calibration text."""


class Dense(NamedTuple):
    """``ids``: (samples, length). ``at``: where the next token counts. ``hidden_ND``: what the head reads there."""

    ids: torch.Tensor
    at: tuple[torch.Tensor, ...]
    hidden_ND: torch.Tensor


@torch.no_grad()
def dense_predictions(
    model: Model, plan: PruningPlan, job: Job, text: CalibrationSet | None, execution: Execution
) -> Dense | None:
    """What `compared` needs of the model before its cut; None where no text is new, and where the head is cut."""
    if text is None or job.calibration is None or {c.kind for c in plan.cuts.values() if c.layer is None} - {LAYER}:
        return None
    with execution.stages.stage("quality"), execution.weights.outside():
        ids = job.calibration.held_out(text, model, execution, job.seed)
        at = _unseen(ids, text.input_ids)
        hidden_BTD = execution.ranks.from_first(lambda: _at_head(execution, ids)[0])
    return Dense(ids, at, hidden_BTD[at]) if hidden_BTD is not None and len(at[0]) else None


def _unseen(ids: torch.Tensor, calibration: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Samples and positions of ``ids`` whose next token counts, see `RUN`."""
    size = min(RUN, ids.shape[1])

    def runs(text: torch.Tensor) -> list[bytes]:
        return [run.tobytes() for run in text.unfold(1, size, 1).reshape(-1, size).numpy()]

    seen = set(runs(calibration))
    is_new = torch.tensor([run not in seen for run in runs(ids)]).view(len(ids), -1)
    samples, starts = is_new.nonzero(as_tuple=True)
    return samples, starts + size - 2  # predicts the last token of the run


def _at_head(execution: Execution, ids: torch.Tensor) -> tuple[torch.Tensor | None, int | None]:
    """What the head reads, (samples, length, hidden size), if it can be seen; and `LayerForm.tuples` of a layer."""
    model, read, returned = execution.model, list[torch.Tensor](), list[Any]()

    def stop(_: Any, args: tuple[torch.Tensor]) -> None:
        read.extend(args)
        raise Stop

    head = model.get_output_embeddings() or torch.nn.Identity()
    watched = execution.layers[-1].register_forward_hook(lambda _, __, output: returned.append(output))
    with watched, head.register_forward_pre_hook(stop), suppress(Stop):
        with_fast_products(model, partial(model, input_ids=ids.to(model.device), use_cache=False))
    further = len(returned[0]) - 1 if isinstance(returned[0], tuple | list) else None
    return (read[0] if read and read[0].shape[:2] == ids.shape else None), further


def compared(dense: Dense | None, pruned: Model, execution: Execution) -> Quality | None:
    """The `Quality` of a model after its cut; None without ``dense``, and where it is not a number."""
    if dense is None:
        return None
    with execution.stages.stage("quality"):
        return execution.ranks.from_first(lambda: _compared(dense, pruned))


@torch.no_grad()
def _compared(dense: Dense, pruned: Model) -> Quality | None:
    execution, tokens = Execution(pruned.weights), len(dense.hidden_ND)
    kl, agreed = 0.0, 0
    with pruned.weights.outside():
        hidden_BTD, further = _at_head(execution, dense.ids)
        assert hidden_BTD is not None, "as in the dense model"
        both_2ND = torch.stack([dense.hidden_ND, hidden_BTD[dense.at]])
        rows = max(1, LOGIT_ELEMENTS // (2 * predicted_tokens(pruned.network)))
        for part_2ND in torch.split(both_2ND, rows, 1):
            before, after = _logits(execution, dense.ids[:1, :1], part_2ND, further)
            kl += float(doubled(divergences(before, after)).sum())
            agreed += int((before.argmax(-1) == after.argmax(-1)).sum())
    return Quality(kl / tokens, agreed / tokens, tokens) if isfinite(kl) else None


def _logits(execution: Execution, token: torch.Tensor, hidden_2ND: torch.Tensor, further: int | None) -> Any:
    """Logits (2, N, V) of what the head reads; the model runs without its layers, on one ``token`` (1, 1)."""

    def unchanged(_: int, /, *args: Any, **kwargs: Any) -> Any:
        return as_output(hidden_of(args, kwargs), further)

    network: Any = execution.model
    head = network.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda *_: (hidden_2ND.to(head.weight.dtype),))
    with hook, replaced_layers(execution.layers, unchanged):
        return network(input_ids=token.to(network.device), use_cache=False).logits
