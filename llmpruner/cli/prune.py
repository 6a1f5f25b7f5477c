"""``llmpruner plan`` and ``llmpruner prune``: the same options, without and with the cut."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..budgets.sizes import counts
from ..errors import ModelError, SelectionError, UnknownNameError
from ..importance.base import ImportanceCriterion
from ..importance.reductions import REDUCTION_NAMES
from ..loading.options import LoadOptions
from ..methods.presets import BEST, BY_HAND, METHODS
from ..selection.allocate import ALLOCATIONS
from ..selection.normalize import NORMALIZATIONS
from ..selection.search import MEASURED
from ..structure.coupling import LAYER
from ..structure.kept import parameters_after
from ..structure.plan import PruningPlan
from .console import RichProgress, count, note, out, print_json, size, table
from .options import (
    HOW_MUCH,
    Json,
    Model,
    Output,
    Seed,
    catalog_of,
    load_options,
    new_directory,
    new_file,
    open_model,
    parse_layers,
    parse_names,
    parse_target,
    spliced,
)
from .prune_options import (
    Allocation,
    Budget,
    Calibration,
    Compensate,
    Context,
    Importance,
    Kinds,
    Layers,
    Length,
    MethodName,
    Normalize,
    Ratio,
    Reduction,
    RoundTo,
    Samples,
    Steps,
    TargetParams,
    UnitRatio,
    Variant,
)

if TYPE_CHECKING:
    from ..data.calibration import CalibrationSet
    from ..loading.model import LoadedConfig, LoadedModel
    from ..recipes.pipeline import PruneSettings
    from ..structure.coupling import CouplingGraph
    from ..structure.plan import PruningPlan, Target


@dataclass(frozen=True)
class Choice:
    """How much to remove and how to choose it, as the user said it; names are checked before any model loads.
    ``length``: tokens per sample, if the user said so."""

    criterion: ImportanceCriterion
    target: Target
    kinds: tuple[str, ...]
    layers: str | None
    length: int | None
    rest: Mapping[str, Any]

    def settings(self, loaded: LoadedConfig) -> PruneSettings:
        from ..recipes.pipeline import PruneSettings

        layers = parse_layers(self.layers, loaded.graph.num_layers)
        rest = dict(self.rest)
        if self.length is None:
            # A default must not ask for more than the model can read.
            limit = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
            rest["length"] = min(rest["length"], limit or rest["length"])
        return PruneSettings(target=self.target, kinds=self.kinds, layers=layers, **rest)


def choice(
    ctx: typer.Context,
    ratio: Ratio = None,
    budget: Budget = "decoder",
    context: Context = None,
    target_params: TargetParams = None,
    unit_ratio: UnitRatio = None,
    kinds: Kinds = "mlp",
    layers: Layers = None,
    round_to: RoundTo = 1,
    method: MethodName = None,
    importance: Importance = None,
    variant: Variant = None,
    reduction: Reduction = "sum",
    allocation: Allocation = "uniform",
    normalize: Normalize = "none",
    steps: Steps = 1,
    compensate: Compensate = None,
    calibration: Calibration = "self",
    samples: Samples = None,
    length: Length = None,
    seed: Seed = 0,
) -> Choice | None:
    """The options of choice; None when nothing says how much (only ``prune --plan`` accepts that)."""
    from ..data.calibration import SELF, sources_of
    from ..recipes.pipeline import COMPENSATIONS

    if ratio is None and target_params is None and unit_ratio is None:
        return None
    if method is not None and method not in METHODS:
        raise UnknownNameError("method", method, METHODS)
    preset = METHODS[method] if method else BY_HAND if importance else BEST
    compensate = compensate or preset.compensate
    for what, name, known in (
        ("reduction", reduction, REDUCTION_NAMES),
        ("allocation", allocation, (*ALLOCATIONS, *MEASURED)),
        ("normalization", normalize, NORMALIZATIONS),
        ("compensation", compensate, COMPENSATIONS),
    ):
        if name not in known:
            raise UnknownNameError(what, name, known)
    many, long = preset.amount(writes=SELF in sources_of(calibration))
    rest = {
        "round_to": round_to,
        "reduction": reduction,
        "allocation": allocation,
        "normalization": normalize,
        "steps": steps,
        "compensate": compensate,
        "calibration": calibration,
        "samples": samples or many,
        "length": length or long,
        "seed": seed,
    }
    names = parse_names(kinds, "--kinds")
    default = preset.of_layers if preset.of_layers and names == (LAYER,) else preset.importance
    chosen = variant if importance else variant or preset.variant
    criterion = catalog_of(ctx).criteria[importance or default](**({"variant": chosen} if chosen else {}))
    target = parse_target(ratio, target_params, unit_ratio, budget, context)
    return Choice(criterion, target, names, layers, length, rest)


def add_commands(app: typer.Typer) -> None:
    app.command(name="plan")(plan)
    app.command(name="prune")(prune)


@spliced(chosen=choice, options=load_options)
def plan(
    ctx: typer.Context,
    model: Model,
    chosen: Choice | None,
    options: LoadOptions,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan to this JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Say what would go, layer by layer, and what would be left: a dry run. The plan can be reviewed and replayed."""
    from ..recipes.pipeline import make_plan

    if chosen is None:
        raise SelectionError(HOW_MUCH)
    if output is not None:
        new_file(output)
    loaded = open_model(ctx, model, options)
    progress, settings, calibration = _prepare(loaded, chosen)
    made = make_plan(loaded, chosen.criterion, settings, progress, calibration)
    if output is not None:
        made.save(output)
        note(f"plan written to {output}; run: llmpruner prune {model} --plan {output} -o DIR")
    result = plan_result(loaded, made)
    if as_json:
        print_json({"plan": made.model_dump(mode="json"), "result": result})
    else:
        show_plan(loaded.graph, made, result)


@spliced(chosen=choice, options=load_options)
def prune(
    ctx: typer.Context,
    model: Model,
    output: Output,
    chosen: Choice | None,
    options: LoadOptions,
    plan_file: Annotated[
        Path | None,
        typer.Option("--plan", help="Replay this plan instead of making one; see `llmpruner plan`."),
    ] = None,
    no_tokenizer: Annotated[
        bool, typer.Option("--no-tokenizer", help="Prune the weights alone of a model that brings no tokenizer.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove the least important structures and write an ordinary Hugging Face directory.

    By default one forward pass over text that the model writes chooses what goes, and least squares repairs what is
    left: no training and no corpus. `--method llm-pruner` is the method of LLM-Pruner (Ma, Fang, Wang, NeurIPS 2023).
    """
    from ..recipes.pipeline import Draft, apply_draft, draft_plan, save

    started = time.monotonic()
    if (chosen is None) == (plan_file is None):
        raise SelectionError(HOW_MUCH if chosen is None else "--plan says how much already; leave out the amount")
    replayed = None if plan_file is None else PruningPlan.load(plan_file)
    new_directory(output)
    loaded = open_model(ctx, model, options)
    if loaded.tokenizer is None and not no_tokenizer:
        raise ModelError(
            f"model '{model}' brings no tokenizer, without which the pruned model can read no text; put its files "
            "(tokenizer.model, say) into the folder, or prune the weights alone with --no-tokenizer"
        )
    if replayed:
        replayed.check(loaded.graph)
        draft = Draft(replayed)
    else:
        chosen = cast("Choice", chosen)
        progress, settings, calibration = _prepare(loaded, chosen)
        draft = draft_plan(loaded, chosen.criterion, settings, progress, calibration)
    result = plan_result(loaded, draft.plan)
    pruned = apply_draft(loaded, draft, RichProgress())
    note("saving")
    kind, made = save(pruned, output), pruned.plans[-1]
    result |= {"output": str(output), "checkpoint": kind, "seconds": round(time.monotonic() - started, 1)}
    if as_json:
        print_json({"plan": made.model_dump(mode="json"), "result": result})
        return
    show_plan(loaded.graph, made, result)
    needs = "and trust_remote_code=True, or llmpruner.load_pruned" if kind == "shim" else "as any model does"
    out.print(f"[bold green]✓[/] {output} in {result['seconds']} s; loads with from_pretrained {needs}")


def _prepare(loaded: LoadedModel, chosen: Choice) -> tuple[RichProgress, PruneSettings, CalibrationSet | None]:
    """What comes before a plan: settings with what their budget had to measure, and the calibration text."""
    from ..recipes.pipeline import calibrate, measured

    progress = RichProgress()
    settings = measured(loaded, chosen.settings(loaded), progress)
    return progress, settings, calibrate(loaded, chosen.criterion, settings, progress)


def plan_result(loaded: LoadedModel, made: PruningPlan) -> dict[str, Any]:
    """What the plan leaves, in parameters, bytes, and what its budget counts."""
    from ..budgets.open import byte_cost, cost_of

    graph, target = loaded.graph, made.target
    groups = [graph.by_name[name] for name in made.cuts]
    total, decoder = parameters_after(graph, made.kept)
    left = counts(graph, made.kept)
    weights = byte_cost(loaded.model, graph, groups)
    result: dict[str, Any] = {
        "parameters_before": graph.total_parameters,
        "parameters_after": total,
        "decoder_before": graph.decoder_parameters,
        "decoder_after": decoder,
        "decoder_removed": 1 - decoder / graph.decoder_parameters,
        "bytes_before": weights.remaining(),
        "bytes_after": weights.remaining(*left),
    }
    if target.by == "ratio" and target.budget in ("macs", "kv-cache", "latency"):
        cost = cost_of(target, loaded.model, graph, groups, loaded.family)
        before, after = cost.remaining(), cost.remaining(*left)
        result["budget"] = {
            "name": target.budget,
            "label": cost.label,
            "before": cost.value(before),
            "after": cost.value(after),
            "removed": 1 - after / before,
        }
    return result


def show_plan(graph: CouplingGraph, made: PruningPlan, result: Mapping[str, Any]) -> None:
    """Layer by layer, how many units of each kind stay; then the sums."""
    kinds = [kind for kind in graph.kinds if any(c.kind == kind for c in made.cuts.values())]
    inner = [kind for kind in kinds if any(c.kind == kind and c.layer is not None for c in made.cuts.values())]
    rows = []
    for layer in sorted({c.layer for c in made.cuts.values() if c.layer is not None}):
        cells = {c.kind: f"{len(c.kept):,} of {c.units:,}" for c in made.cuts.values() if c.layer == layer}
        rows.append((str(layer), *(cells.get(kind, "all") for kind in inner)))
    if rows:
        table("Units kept", ("Layer", *inner), rows)
    for name, group in made.cuts.items():
        if group.layer is None:
            gone = sorted(set(range(group.units)) - set(group.kept))
            detail = f" (gone: {', '.join(map(str, gone))})" if len(gone) <= 40 else ""
            out.print(f"{name}: {len(group.kept):,} of {group.units:,} units kept{detail}", highlight=False)
    sums = [
        _row("Decoder parameters", result["decoder_before"], result["decoder_after"], count),
        _row("All parameters", result["parameters_before"], result["parameters_after"], count),
        _row("Weights", result["bytes_before"], result["bytes_after"], size),
    ]
    if budget := result.get("budget"):
        text = {"macs": count, "kv-cache": "{:,} bytes".format, "latency": "{:,.3f} ms".format}[budget["name"]]
        sums.append(_row(budget["label"], budget["before"], budget["after"], text))
    table("Result", ("", "Before", "After", "Removed"), sums)


def _row(label: str, before: float, after: float, text: Any) -> tuple[str, str, str, str]:
    return label, text(before), text(after), f"{1 - after / before:.2%}"
