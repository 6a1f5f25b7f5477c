"""A pruned checkpoint beside the dense model that it was made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from ..discovery.dense import check_named_base, dense_structure, open_dense
from ..discovery.silenced import distance, logits, silenced
from ..discovery.verify import TOLERANCE
from ..errors import CheckpointError
from ..files import exists
from ..models.meta import meta_model
from ..models.numbers import loaded_bytes
from ..models.opening import why_not_streamed
from ..models.surgery import cut
from ..models.weights import CutWeights, StreamedWeights, Weights
from ..settings import DEMO, LoadSettings
from ..structure.coupling import Role, layer_number
from ..structure.kept import compose_all, layer_numbers, restrict

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..models.model import Structure
    from ..plugins.catalog import Catalog
    from ..structure.coupling import CouplingGraph
    from ..structure.plan import PruningPlan

_ROUNDED = 2e-2
"""As `TOLERANCE` of the oracle, for 16-bit weights."""
_ROWS, _LENGTH = 2, 16


class NotComparable(Exception):
    """The model cannot be compared with its base; the message says why."""


def at_hand(structure: Structure) -> bool:
    """Whether the dense model is on this machine, by the record of ``structure``, which was pruned."""
    path, ref = (structure.record or {}).get("base_path"), structure.plans[0].base.model
    return (isinstance(path, str) and exists(path)) or ref == DEMO or exists(ref)


class Base:
    """The dense model of a pruned ``structure``, cut by its plans once more.

    ``named``: its reference, instead of that of the record. ``load``: how both models are opened. It is in memory where
    it takes less than half of the free memory, and is read layer by layer otherwise. Raises `ModelError` where it
    cannot be opened, or is another model.
    """

    def __init__(self, structure: Structure, named: str | None, load: LoadSettings, catalog: Catalog) -> None:
        if named is not None:
            check_named_base(structure, named, catalog, trust_remote_code=load.trust_remote_code)
        pruned = structure if named is None else _made_from(structure, named)
        dense = dense_structure(pruned, catalog, trust_remote_code=load.trust_remote_code)
        streams = why_not_streamed(dense, catalog, load, cuts=False) is None
        large = loaded_bytes(dense, load) > psutil.virtual_memory().available // 2
        self.ref, self.plans, self._catalog = dense.ref, structure.plans, catalog
        record = structure.record or {}
        self._trained = bool(record.get("recovery") or record.get("adapters"))
        self._dense = open_dense(pruned, catalog, load, streamed=streams and large)
        generator = torch.Generator().manual_seed(0)
        vocabulary = int(self._dense.model.get_input_embeddings().weight.shape[0])
        self.tokens = torch.randint(vocabulary, (_ROWS, _LENGTH), generator=generator)
        self._silenced: torch.Tensor | None = None
        self.weights = self._in_memory() if self._dense.streamed is None else self._streamed(self._dense.streamed)

    def kept_weights(self, checked: Weights) -> str:
        """Compare the weights that the cut left as they are, and the norms that it scales, bit for bit; returns what
        was compared. ``checked``: the weights of the checkpoint. Raises `CheckpointError` with the first tensor that
        differs, `NotComparable` where all may have changed."""
        if self._trained:
            raise NotComparable("weights were trained after the cut")
        changed = self._changed()
        count = left = 0
        for part in (None, *range(len(checked.model.get_submodule(checked.path)))):
            with checked.part(part), self.weights.part(part):
                found, expected = _parameters(checked), _parameters(self.weights)
                for name in sorted(n for n in expected if checked.number(n) == part):
                    if name.rpartition(".")[0] in changed:
                        left += 1
                    elif name not in found or not torch.equal(found[name], expected[name]):
                        raise CheckpointError(f"tensor '{name}' is not that of the base '{self.ref}', cut by the plans")
                    else:
                        count += 1
        rest = f"; {left} that a compensation fitted are left out" if left else ""
        return f"{count} tensors are those of '{self.ref}', bit for bit{rest}"

    def logits(self, checked: Weights) -> str:
        """Compare the logits of random tokens; returns what was compared. Raises as `kept_weights`."""
        why_not = self._why_no_logits()
        if why_not is not None:
            raise NotComparable(why_not)
        expected = logits(self.weights.model, self.tokens) if self._silenced is None else self._silenced
        what = "a new cut of the base" if self._silenced is None else "the base with the removed units silenced"
        found = distance(logits(checked.model, self.tokens).float(), expected.float())
        if not found <= (TOLERANCE if checked.model.dtype == torch.float32 else _ROUNDED):
            raise CheckpointError(
                f"the logits differ from {what} by {found:.0e} of the largest, although the weights are right: "
                "config.json or the code beside it is not that of the model"
            )
        return f"those of {what} (difference {found:.0e} of the largest)"

    def _why_no_logits(self) -> str | None:
        if self._trained:
            return "weights were trained after the cut"
        compensated = any(plan.compensation is not None for plan in self.plans)
        return "weights were fitted to compensate for the cut" if compensated else None

    def _changed(self) -> set[str]:
        """Paths of the modules, in the pruned model, whose weights a compensation changed."""
        found: set[str] = set()
        graph = self._dense.graph
        for plan in self.plans:
            if plan.compensation is not None:
                record = plan.compensation
                how = self._catalog.create(self._catalog.compensations, record.name, record.settings)
                if not how.changes_readers_alone:
                    raise NotComparable(f"{how.label()} may have changed any weight")
                found |= {
                    span.parameter.rpartition(".")[0]
                    for name in how.changed_groups(graph, plan.kept)
                    for span in graph.by_name[name].spans_with(Role.CONSUMES)
                }
            found = {path for old in found if (path := _after(old, graph, plan)) is not None}
            graph = restrict(graph, plan.kept)
        return found

    def _in_memory(self) -> Weights:
        model, graph, family = self._dense.model, self._dense.graph, self._dense.family
        if model.dtype == torch.float32 and self._why_no_logits() is None:
            # What is silenced is cut afterwards, so that no copy is needed.
            with silenced(model, graph, compose_all(graph, [plan.kept for plan in self.plans])):
                self._silenced = logits(model, self.tokens)
        for plan in self.plans:
            graph = cut(model, graph, plan.kept, family)
        return Weights(model, graph.layers)

    def _streamed(self, weights: StreamedWeights) -> StreamedWeights:
        graph = self._dense.graph
        for count, plan in enumerate(self.plans, start=1):
            network, following = self._without_weights(count)
            weights = CutWeights(network, weights, graph, plan.kept)
            graph = following
        return weights

    def _without_weights(self, count: int) -> tuple[PreTrainedModel, CouplingGraph]:
        """The model, and its graph, after the first ``count`` plans."""
        network, graph = meta_model(self._dense.config, self._dense.model.dtype), self._dense.graph
        for plan in self.plans[:count]:
            graph = cut(network, graph, plan.kept, self._dense.family)
        return network, graph


def _parameters(weights: Weights) -> dict[str, torch.nn.Parameter]:
    """All names of all parameters, those of tied ones too."""
    return dict(weights.model.named_parameters(remove_duplicate=False))


def _made_from(structure: Structure, named: str) -> Structure:
    """``structure``, whose record names another base."""
    first, *later = structure.plans
    ref = str(Path(named).absolute()) if exists(named) else named
    first = first.model_copy(update={"base": first.base.model_copy(update={"model": ref, "revision": None})})
    record = {key: value for key, value in (structure.record or {}).items() if key != "base_path"}
    return replace(structure, plans=(first, *later), record=record)


def _after(path: str, graph: CouplingGraph, plan: PruningPlan) -> str | None:
    """A module path after the cut; None where its layer is removed."""
    number = layer_number(path, graph.layers)
    if number is None:
        return path
    now = layer_numbers(graph, plan.kept).get(number)
    old = f"{graph.layers}.{number}"
    return None if now is None else f"{graph.layers}.{now}{path.removeprefix(old)}"
