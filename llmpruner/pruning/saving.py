"""From kept units to a checkpoint: the plan, sizes before and after, the cut, and saving."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .. import __version__
from ..discovery.cut import cut
from ..discovery.groups import build_graph
from ..discovery.opening import base_record
from ..engine.signals import Signal
from ..engine.walk import CalibrationSet
from ..errors import ModelError
from ..models.meta import meta_model
from ..models.model import Model, Structure
from ..models.numbers import stored_dtype
from ..models.record import read_any_record
from ..models.save import save_checkpoint
from ..models.vocabulary import Vocabulary
from ..models.weights import DerivedWeights
from ..structure import plan as records
from ..structure.coupling import VOCABULARY
from ..structure.kept import Kept, restrict
from ..structure.outcome import BudgetOutcome, Outcome, ScriptTokens, TextTokens, TokenOutcome
from ..structure.plan import GroupCut, PruningPlan
from .budgets import Budget, BudgetSubject, WeightBytes, counts
from .compensation.least_squares import Fit
from .criteria.whole import counted_part, scripts_of, texts_of
from .job import PruneJob
from .selection import scope_of, widths_of

SCRIPTS = 6
"""Those with most tokens; others are counted together."""


def plan_of(model: Model, job: PruneJob, kept: Kept, text: CalibrationSet | None) -> PruningPlan:
    """The plan that keeps ``kept``."""
    signals = job.criterion.needs | (job.token_criterion.needs if job.token_criterion else set())
    of_scores: dict[str, Any] = {}
    of_fits: dict[str, Any] = {}
    if text is not None and job.calibration is not None:
        samples, length = text.input_ids.shape
        read = {"calibration": text.source, "sources": job.calibration.record(), "fingerprint": text.fingerprint}
        of_scores = read if signals - {Signal.WEIGHT} or job.allocation.measures else {}
        of_fits = {**read, "samples": samples, "length": length} if job.compensation.reads_text else {}
    compensation, settings = None, job.compensation.record()
    if job.compensation.name != "none":
        compensation = records.CompensationRecord(name=job.compensation.name, settings=settings, **of_fits)
    structure = records.structure_of(model.graph)
    return PruningPlan(
        base=records.BaseRef(model=model.ref, revision=model.reference.commit, structure=structure),
        family=model.family.name,
        estimation=records.EstimationRecord(
            criterion=job.criterion.name, settings=job.criterion.record(), reduction=job.reduction, **of_scores
        ),
        selection=records.SelectionRecord(
            kinds=job.kinds,
            layers=scope_of(job, model).layers,
            allocation=job.allocation.name,
            settings=job.allocation.record(),
            steps=job.steps,
            shape=job.shape,
            round_to=widths_of(job, model).round_to,
        ),
        compensation=compensation,
        target=records.Target(by=job.by, amount=job.amount, budget=job.budget.name, settings=job.budget.record()),
        seed=job.seed,
        cuts=records.cuts_of(model.graph, kept),
    )


def outcome_of(model: Model, plan: PruningPlan, budget: Budget, text: CalibrationSet | None) -> Outcome:
    """The `Outcome` of a plan for ``model`` before the cut. ``budget``: the plan's."""
    graph, target = model.graph, plan.target
    groups = [graph.by_name[name] for name in plan.cuts]
    after, left = restrict(graph, plan.kept), counts(graph, plan.kept)
    subject = BudgetSubject(model.network, graph, groups, model.family)
    weights, cost_of_budget = WeightBytes().cost(subject), None
    if target.by == "ratio" and target.budget not in ("decoder", "parameters", "bytes"):
        cost = budget.cost(subject)
        cost_of_budget = BudgetOutcome(target.budget, cost.label, cost.remaining(), cost.remaining(*left))
    before, memory, stored = weights.remaining(), model.network.dtype, stored_dtype(model)
    # The budget of bytes, by which the plan was made, counts those in memory.
    if target.budget != "bytes" and stored is not None and stored.itemsize < memory.itemsize:
        before = before * stored.itemsize // memory.itemsize
    tokens = (token_outcome(model.tokenizer, cut, text) for cut in plan.cuts.values() if cut.kind == VOCABULARY)
    return Outcome(
        graph.total_parameters, after.total_parameters, graph.decoder_parameters, after.decoder_parameters, before,
        weights.remaining(*left), cost_of_budget, tokens=next(tokens, None),
    )  # fmt: skip


def token_outcome(tokenizer: Any, cut: GroupCut, text: CalibrationSet | None) -> TokenOutcome:
    """``cut``: of the tokens of ``tokenizer``. ``text``: what they were chosen on; None where none was read."""
    kept = frozenset(cut.kept)
    pieces = texts_of(tokenizer)[: cut.units]
    pieces += [""] * (cut.units - len(pieces))  # rows that no token has
    scripts = [min(scripts_of(piece), default="no letters") for piece in pieces]
    largest = dict(Counter(scripts).most_common(SCRIPTS))
    scripts = [script if script in largest else "other" for script in scripts]
    used = Counter[int]() if text is None else Counter(text.input_ids.flatten().tolist())
    gone = sorted(frozenset(range(cut.units)) - kept, key=lambda token: (-used[token], token))
    rows = []
    for script, number in Counter(scripts).most_common():
        lost = [pieces[token] for token in gone if scripts[token] == script]
        shown = [piece for piece in lost if 0 < len(piece) <= 16 and "\ufffd" not in piece]
        rows.append(ScriptTokens(script, number, len(lost), tuple(shown[:8])))
    texts = {}
    if text is not None:
        trimmed, counted = Vocabulary(tokenizer).trimmed(kept), counted_part(text).input_ids
        for name, ids in (("counted", counted), ("held_out", text.input_ids[len(counted) :])):
            if len(ids):
                written = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                size = len("".join(written).encode())
                encoded = (coder(written, add_special_tokens=False, verbose=False) for coder in (tokenizer, trimmed))
                before, after = (size / max(1, sum(map(len, each["input_ids"]))) for each in encoded)
                tokens = ids.flatten().tolist()
                texts[name] = TextTokens(len(tokens), sum(token not in kept for token in tokens), before, after)
    return TokenOutcome(cut.units, len(kept), tuple(rows), texts)


def cut_model(model: Model, plan: PruningPlan) -> Model:
    """The model without the units that the plan removes: cut in place in memory, or when its weights are read."""
    for name, units in plan.kept.items():
        if model.graph.by_name[name].kind == VOCABULARY:
            model = replace(model, tokenizer=Vocabulary(model.tokenizer).trimmed(units))
    plans = (*model.plans, plan)
    if model.streamed is None:
        graph = cut(model.network, model.graph, plan.kept, model.family)
        return replace(model, graph=graph, plans=plans)
    network = without_weights(model, model.network.dtype)
    network.generation_config = copy.deepcopy(model.network.generation_config)
    network.config.name_or_path = model.network.config.name_or_path
    graph = cut(network, model.graph, plan.kept, model.family)
    weights = DerivedWeights(network, model.streamed, (model.graph, plan.kept))
    return replace(model, network=network, graph=graph, plans=plans, streamed=weights)


def with_outcome(pruned: Model, outcome: Outcome, fits: Sequence[Fit]) -> Model:
    """``pruned`` with what its last cut did, as ``llmpruner.json`` keeps it."""
    work: dict[str, Any] = {"fits": [asdict(fit) for fit in fits]}
    work |= {name: asdict(value) for name in ("tokens", "quality") if (value := getattr(outcome, name)) is not None}
    return replace(pruned, work=(*pruned.work, work), outcome=outcome)


def without_weights(structure: Structure, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of ``structure`` after its cuts, with parameters on the meta device."""
    network = meta_model(structure.config, dtype)
    if structure.plans:
        graph = build_graph(structure.family, structure.config)
        for plan in structure.plans:
            graph = cut(network, graph, plan.kept, structure.family)
    return network


def save(model: Model, directory: Path) -> str:
    """Write an ordinary Hugging Face directory; returns its form, ``stock`` or ``shim``. Raises `ModelError` for a
    model that is half-changed, or that was cut by other means, which could not be loaded."""
    model.check_whole()
    for name, parameter in model.network.named_parameters(remove_duplicate=False):
        expected, shape = model.graph.shapes.get(name), tuple(parameter.shape)
        if shape != expected:
            raise ModelError(
                f"parameter '{name}' of '{model.ref}' has shape {shape}, and by the model's "
                f"{len(model.plans)} plans {expected}; save what llmpruner.prune returned, or load the model again"
            )
    # Weights are stored dequantised.
    values = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    record = {
        **_earlier_record(model),
        **base_record(model),
        "llmpruner": __version__,
        "plans": [plan.model_dump(mode="json") for plan in model.plans],
        "work": [*(model.record or {}).get("work", ()), *model.work],
        "base_config": dict(model.config._encode_special_floats(values)),
    }
    return save_checkpoint(
        model.network, directory, record=record, tokenizer=model.tokenizer, family=model.family, parts=model.streamed
    )


def _earlier_record(model: Model) -> dict[str, Any]:
    """The earlier record without the trainings and adapters of the dense model, which restored nothing that was cut."""
    record = dict(model.record or {})
    if not model.plans or record.get("plans"):
        return record
    record.pop("adapters", None)
    saved = (None if model.path is None else read_any_record(model.path)) or {}
    since = record.pop("recovery", [])[len(saved.get("recovery") or ()) :]
    return {**record, "recovery": since} if since else record
