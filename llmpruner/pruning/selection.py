"""Selection: which units a job removes. Units are scored, and the amount is allocated to groups, in steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, isfinite
from typing import Any

import torch
from transformers import PreTrainedModel

from ..discovery.cut import cut, cut_copy
from ..engine.execution import Execution
from ..engine.journal import recalled
from ..engine.signals import GRADIENTS, Signal
from ..engine.statistics import divergence
from ..engine.walk import CalibrationSet
from ..errors import ModelError, SelectionError
from ..models.family import ModelFamily
from ..models.model import Model, Structure
from ..models.numbers import with_fast_products
from ..models.vocabulary import removable_tokens, whole_first
from ..models.weights import Weights
from ..progress import QUIET, Progress
from ..structure.coupling import LAYER, VOCABULARY, CoupledGroup, CouplingGraph
from ..structure.kept import Kept, compose, layer_numbers, removed_layers, renamed
from ..structure.plan import dense_units
from ..structure.scope import ANY, NARROW, Scope, Widths, build_queue, like, widths_for
from ..values import chosen_layers
from .allocation import Allocation, AllocationTask, Meter, Taken, Uniform
from .budgets import BudgetSubject, Cost, counts, parameter_cost, saving_units
from .criteria.estimate import Scores, estimate
from .criteria.whole import counted_part
from .job import PruneJob

GRADIENT_TOKENS = 12288
"""Calibration tokens for scores that need gradients, where a compensation reads more text."""
TRIED = 2048
"""Number of tokens that the predictions of a trial cut are compared on."""


def choose(model: Model, job: PruneJob, text: CalibrationSet | None, execution: Execution) -> Kept:
    """Group name → kept units, chosen in one step or several. Raises `SelectionError` for an unreachable amount."""
    kept: Kept = {}
    current = _Current(model, job, kept, text, execution)
    whole = current.cost
    # With equal shares, the numbers of units are decided once. Where layers alone go, each step takes its amount.
    once = job.steps > 1 and job.allocation.equal_shares and set(job.kinds) != {LAYER}
    numbers: dict[str, float] = {}
    for step in range(1, job.steps + 1):
        last = step == job.steps
        amount = demand(job, whole, current.cost, current.groups, current.scope, step)
        with execution.stages.stage("scores"):
            current.score(amount)
        with execution.stages.stage("selection"):
            if once and step == 1:
                total = demand(job, whole, whole, current.groups, current.scope, job.steps)
                numbers = lost(current.graph, current.groups, current.select(total, job.allocation))
            chosen = None
            if once and not last:
                chosen = current.select(current.part(numbers, step / job.steps), Uniform())
                left = whole.remaining(*counts(model.graph, compose(model.graph, kept, chosen)))
                # Layers that go may be larger than those that were counted when their number was decided.
                if chosen and amount.whole is not None and current.cost.remaining() - left > amount.whole:
                    chosen = None
            if chosen is None:
                chosen = current.select(amount, job.allocation)
        kept = compose(model.graph, kept, chosen)
        # Where a step removed nothing, as its amount was less than the next unit, its scores hold for the next one.
        if chosen and not last:
            del current  # with its copy of the model
            current = _Current(model, job, kept, text, execution)
    if not kept:
        raise SelectionError("the amount asked for is less than one unit of the selected groups; ask for more")
    return kept


class _Current:
    """``model`` after steps that kept ``kept``: a copy of its network that is cut, and the copy's graph, scope, widths,
    groups and cost. ``scores``: as the allocation compares them, once they are known. ``loss``: of trial cuts."""

    def __init__(
        self, model: Model, job: PruneJob, kept: Kept, text: CalibrationSet | None, execution: Execution
    ) -> None:
        self.model, self.job, self.kept, self.text, self.execution = model, job, kept, text, execution
        self.network, self.graph = model.network, model.graph
        self.scope, self.widths = scope_of(job, model), widths_of(job, model)
        if kept:
            self.network = copy.deepcopy(model.network)
            self.graph = cut(self.network, model.graph, kept, model.family)
            weights = Weights(self.network, self.graph.layers)
            self.execution = replace(execution, weights=weights, shared=None)
            numbers, scope = layer_numbers(model.graph, kept), self.scope
            layers = tuple(numbers[n] for n in scope.layers if n in numbers)
            removable = tuple(numbers[n] for n in scope.removable or () if n in numbers)
            self.scope, self.widths = Scope(scope.kinds, layers, removable), self.widths.after(model.graph, kept)
        self.groups = self.scope.groups(self.graph)
        self.scores: Scores = {}
        self.loss: Callable[[Kept], float] | None = None
        with execution.stages.stage("budget"):
            subject = BudgetSubject(self.network, self.graph, self.groups, model.family, execution.progress)
            self.cost = job.budget.cost(subject)

    def score(self, amount: Demand) -> None:
        """Set the scores, unless they are set and do not depend on the amount."""
        blocks = Signal.STREAM_BLOCKS in self.job.criterion.needs
        if self.scores and not blocks:
            return
        length = 1
        if blocks:
            # A criterion of blocks of layers depends on how many layers the amount takes, by themselves.
            (group,) = self.graph.of_kinds([LAYER])
            equal = {group.name: torch.zeros(group.units, dtype=torch.float64)}
            kept = select(self.graph, [group], equal, self.scope, amount, Uniform(), cost=self.cost)
            length = max(1, group.units - len(kept.get(group.name, range(group.units))))
        shared = None if blocks else self.execution.shared
        lists = recalled(shared, "scores", lambda: self._estimate(length))
        scores = {name: torch.tensor(values, dtype=torch.float64) for name, values in lists.items()}
        self.scores = self.job.allocation.comparable(scores, self.graph)

    def _estimate(self, length: int) -> dict[str, list[float]]:
        """``length``: as in `StreamStats`."""
        job, text = self.job, self.text
        token_groups = [group for group in self.groups if group.kind == VOCABULARY]
        others = [group for group in self.groups if job.token_criterion is None or group.kind != VOCABULARY]
        scores: dict[str, torch.Tensor] = {}
        for criterion, groups in ((job.criterion, others), (job.token_criterion, token_groups)):
            if criterion is None or not groups:
                continue
            read = text
            if text is not None and job.compensation.reads_text and criterion.needs & GRADIENTS:
                read = text.first(GRADIENT_TOKENS)
            if text is not None and Signal.TOKENS in criterion.needs:
                read = counted_part(text)
            scores |= estimate(
                self.network, self.graph, groups, criterion, read, reduction=job.reduction, seed=job.seed,
                execution=self.execution, length=length, removable=self.scope.allowed_units(groups[0]),
                tokenizer=self.model.tokenizer,
            )  # fmt: skip
        for group in token_groups:
            scores[group.name] = whole_first(scores[group.name], self.model.tokenizer)
        return {name: values.tolist() for name, values in scores.items()}

    def select(self, amount: Demand, allocation: Allocation) -> Kept:
        if self.loss is None and allocation.measures and self.text is not None:
            self.loss = trial_loss(self.network, self.graph, self.model.family, self.text, self.scores)
        return self.execution.ranks.from_first(
            lambda: select(
                self.graph, self.groups, self.scores, self.scope, amount, allocation,
                cost=self.cost, widths=self.widths, loss=self.loss, progress=self.execution.progress,
            )
        )  # fmt: skip

    def part(self, numbers: Mapping[str, float], share: float) -> Demand:
        """What must go now so that ``share`` of ``numbers``, the units that groups lose in all, is gone after it. Where
        steps took amounts, each could be less than a head or a layer, so that heads and layers would never go."""
        units: dict[str, float] = {}
        before = {new: old for old, new in renamed(self.model.graph, self.kept).items()}
        for group in self.groups:
            dense = self.model.graph.by_name[before[group.name]]
            # Query heads that went with a key/value head are not part of what their own group loses.
            blocks = dense.blocks / group.blocks
            units[group.name] = (group.units * blocks - (dense.units - share * numbers[dense.name])) / blocks
        return Demand(units=units)


@dataclass(frozen=True)
class Demand:
    """To remove: an ``amount`` of a cost, and ``whole`` as in `AllocationTask`; or ``units``, group name → number."""

    amount: int = 0
    whole: int | None = None
    units: Mapping[str, float] | None = None


def scope_of(job: PruneJob, structure: Structure) -> Scope:
    """The kinds and layers that may be cut. Free widths, and whole layers, leave a tenth of layers at either end."""
    count = structure.graph.num_layers
    chosen = chosen_layers(job.layers, count)
    tokens = None
    if VOCABULARY in job.kinds and isinstance(structure, Model):
        tokens = removable_tokens(structure.network, structure.tokenizer)
    if chosen is not None:
        return Scope(job.kinds, chosen, chosen, tokens)
    ends = round(0.1 * count)  # LLM-Pruner protects layers 0–3 and 30–31 of LLaMA-7B's 32
    inner = tuple(range(ends, count - ends))
    return Scope(job.kinds, tuple(range(count)) if job.shape == "uniform" else inner, inner, tokens)


def widths_of(job: PruneJob, structure: Structure) -> Widths:
    """The widths that a job allows in this model."""
    config = structure.config.get_text_config(decoder=True)
    dense = dense_units(structure.plans, structure.graph)
    return widths_for(job.shape, job.round_to, int(getattr(config, "hidden_size", 0) or NARROW), dense)


def demand(job: PruneJob, whole: Cost, now: Cost, groups: Sequence[CoupledGroup], scope: Scope, step: int) -> Demand:
    """What must be removed in step number ``step``, so that ``step / job.steps`` of the amount is removed after it.
    ``whole``: the cost of the dense model; ``now``: of the model after earlier steps. Raises `SelectionError`."""
    if job.by == "tokens":
        (group,) = groups
        gone = group.units - round(job.amount)
        most = len(scope.allowed_units(group) or range(group.units))
        if not 0 < gone <= most:
            raise SelectionError(
                f"vocabulary.tokens={job.amount:.0f}: the model has {group.units:,} tokens, of which "
                f"{group.units - most:,} must stay (special tokens, bytes and single characters)"
            )
        return Demand(units={group.name: float(gone)})
    if job.by == "units":
        return Demand(units={g.name: job.amount * len(scope.allowed_units(g) or range(g.units)) for g in groups})
    dense, left = whole.remaining(), now.remaining()
    if job.by == "ratio":
        after = [dense - round(dense * job.amount * (n / job.steps)) for n in (step, job.steps)]
    else:
        gone = dense - round(job.amount)
        if gone <= 0:
            raise SelectionError(f"prune.target_params {job.amount:,.0f} is not below the model's {dense:,} parameters")
        after = [dense - ceil(gone * (n / job.steps)) for n in (step, job.steps)]
    return Demand(amount=left - after[0], whole=None if step == job.steps else left - after[1])


def lost(graph: CouplingGraph, groups: Sequence[CoupledGroup], kept: Kept) -> dict[str, float]:
    """Group name → units that it loses by a cut to ``kept``; in a layer that goes, as its peers on average."""
    gone = removed_layers(graph, kept)
    stay = [group for group in groups if group.layer not in gone]
    numbers: dict[str, float] = {g.name: g.units - len(kept.get(g.name, range(g.units))) for g in stay}
    for group in groups:
        if group.name not in numbers:
            peers = [g for g in stay if like(g) == like(group)] or [g for g in stay if g.kind == group.kind]
            share = sum(numbers[g.name] for g in peers) / max(sum(g.units for g in peers), 1)
            numbers[group.name] = group.units * share
    return numbers


def select(
    graph: CouplingGraph, groups: Sequence[CoupledGroup], scores: Scores, scope: Scope, demand: Demand,
    allocation: Allocation, *, cost: Cost | None = None, widths: Widths = ANY,
    loss: Callable[[Kept], float] | None = None, progress: Progress = QUIET,
) -> Kept:  # fmt: skip
    """Group name → kept units, chosen in one step or several. Raises `SelectionError` for an unreachable amount."""
    cost = cost or parameter_cost(graph, groups, decoder=True)
    allowed = {group.name: scope.allowed_units(group) for group in groups}
    if demand.units is None:
        allowed = saving_units(cost, groups, allowed, widths.alike(groups))
    queues = {
        g.name: build_queue(g, scores[g.name].tolist(), allowed=allowed[g.name], multiple=widths.multiple(g))
        for g in groups
        if g.name in allowed
    }
    together = [[queues[name] for name in names if name in queues] for names in widths.alike(groups)]
    members = {alike[0].group.name: alike for alike in together if alike}

    def chosen(taken: Taken) -> Kept:
        losing = [(queue, steps) for name, steps in taken.items() if steps for queue in members[name]]
        kept = {queue.group.name: queue.kept_after(steps) for queue, steps in losing}
        gone = removed_layers(graph, kept)
        return {name: units for name, units in kept.items() if graph.by_name[name].layer not in gone}

    measured = (lambda taken: loss(chosen(taken))) if loss is not None else None
    # Groups that lose the same number of units are equal but for their layers; a step has the mean of their scores.
    joint = []
    for alike in members.values():
        steps = zip(*(queue.scores for queue in alike), strict=True)
        joint.append(replace(alike[0], scores=tuple(sum(each) / len(alike) for each in steps)))
    meter, amount = Meter(cost, members), demand.amount
    if demand.units is not None:
        taken = {queue.group.name: queue.steps_for(demand.units[queue.group.name]) for queue in joint}
        if isinstance(allocation, Uniform):
            return chosen(taken)
        amount = meter.removed(taken)
    most = meter.removed({queue.group.name: len(queue.steps) for queue in joint})
    if (whole := max(amount, demand.whole or 0)) > most:
        raise SelectionError(
            f"cannot remove {whole:,} {cost.label}: the selected kinds and layers can give at most {most:,}; select "
            "more with --kinds or --set prune.layers, or ask for less"
        )
    return chosen(allocation.allocate(AllocationTask(joint, amount, meter, demand.whole, measured, progress)))


@torch.no_grad()
def trial_loss(
    model: PreTrainedModel, graph: CouplingGraph, family: ModelFamily, calibration: CalibrationSet, scores: Scores
) -> Callable[[Kept], float]:
    """Kept units → mean KL divergence of a copy cut to them, in nats per token; tokens cost the sum of their scores."""
    ids = calibration.input_ids.to(model.device)
    rows = max(1, min(TRIED // ids.shape[1], len(ids) // 2))
    tried = torch.split(ids[-rows:], max(1, TRIED // 4 // ids.shape[1]))

    def logits(network: PreTrainedModel, ids: torch.Tensor) -> Any:
        return with_fast_products(network, lambda: network(input_ids=ids, use_cache=False).logits)

    dense = [logits(model, part) for part in tried]

    @torch.no_grad()
    def loss(kept: Kept) -> float:
        tokens = {name: units for name, units in kept.items() if graph.by_name[name].kind == VOCABULARY}
        others = {name: units for name, units in kept.items() if name not in tokens}
        of_tokens = sum(float(scores[name].sum() - scores[name][list(units)].sum()) for name, units in tokens.items())
        if not others:
            return of_tokens
        copied = cut_copy(model, graph, others, family)
        total = sum(divergence(before, logits(copied, part)) for before, part in zip(dense, tried, strict=True))
        if not isfinite(total):
            raise ModelError(
                "the divergence of a trial cut is not a finite number; the weights are damaged, or activations "
                f"overflow in {str(model.dtype).removeprefix('torch.')}"
            )
        return of_tokens + total / sum(part[:, 1:].numel() for part in tried)

    return loss
