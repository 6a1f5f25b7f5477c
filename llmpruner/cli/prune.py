"""``llmpruner plan`` and ``llmpruner prune``: the same options, without and with the cut."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..errors import SelectionError, UnknownNameError
from ..importance.base import ImportanceCriterion
from ..loading import LoadedConfig, LoadedModel, LoadOptions
from ..plan import PruningPlan, Target, parameters_after
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

if TYPE_CHECKING:
    from ..coupling import CouplingGraph
    from ..pipeline import PruneSettings

_WHAT, _HOW, _ON = "How much", "How to choose", "Calibration"

Ratio = Annotated[
    float | None,
    typer.Option(help="Share of the decoder's parameters to remove, hit within one unit.", rich_help_panel=_WHAT),
]
TargetParams = Annotated[
    str | None, typer.Option(help="Total parameters to be left: 5.4B, 120M, 98000000.", rich_help_panel=_WHAT)
]
UnitRatio = Annotated[
    float | None,
    typer.Option(
        help="Share of the units of every selected group to remove, as the paper counts (its 0.25 on layers 4-29 "
        "of LLaMA-7B removes 20 % of the parameters).",
        rich_help_panel=_WHAT,
    ),
]
Kinds = Annotated[
    str,
    typer.Option(
        help="What may go, comma-separated. mlp: MLP channels; attention: KV heads with their query heads (both "
        "together are the paper's block-wise pruning); query: query heads inside KV groups; hidden: channels of the "
        "residual stream (the paper's channel-wise pruning); layer: whole layers. The default is what keeps most "
        "quality on models with few KV heads.",
        rich_help_panel=_WHAT,
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        help="Layers whose units may go: 3-26, 0,5,7-9 or all. By default the family protects both ends (the first and "
        "last 10 %, as the paper protects the ends of LLaMA).",
        rich_help_panel=_WHAT,
    ),
]
RoundTo = Annotated[
    int,
    typer.Option(min=1, help="Kept widths are multiples of this (64 suits most kernels).", rich_help_panel=_WHAT),
]
Importance = Annotated[
    str,
    typer.Option(
        help="Criterion: random, l1, l2, taylor, or one that a plugin adds (see `llmpruner plugins`).",
        rich_help_panel=_HOW,
    ),
]
Variant = Annotated[
    str | None,
    typer.Option(
        help="Variant of the criterion. Of taylor: element1 (first order per weight, the default), element2 (second "
        "order), mix (both), vector (first order per row).",
        rich_help_panel=_HOW,
    ),
]
Reduction = Annotated[
    str,
    typer.Option(help="How the parameters of a unit make one score: sum, mean, max, prod, last.", rich_help_panel=_HOW),
]
Allocation = Annotated[
    str,
    typer.Option(
        help="uniform: equal shares per layer and kind; global: one ranking over all units.",
        rich_help_panel=_HOW,
    ),
]
Steps = Annotated[
    int,
    typer.Option(min=1, help="Remove in this many steps, measuring again after each.", rich_help_panel=_HOW),
]
Calibration = Annotated[
    str,
    typer.Option(
        help="Text for the criterion: self (the model writes it: no corpus needed), a .txt file, a .jsonl with a text "
        "or page field, or a datasets name (name:config:split).",
        rich_help_panel=_ON,
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Calibration samples; the paper uses 10.", rich_help_panel=_ON)]
Length = Annotated[int, typer.Option(min=2, help="Tokens per sample.", rich_help_panel=_ON)]


@dataclass(frozen=True)
class Choice:
    """How much to remove and how to choose it, as the user said it; names are checked before any model loads."""

    criterion: ImportanceCriterion
    target: Target
    kinds: tuple[str, ...]
    layers: str | None
    rest: Mapping[str, Any]

    def settings(self, loaded: LoadedConfig) -> PruneSettings:
        from ..pipeline import PruneSettings

        layers = parse_layers(self.layers, loaded.graph.num_layers)
        return PruneSettings(target=self.target, kinds=self.kinds, layers=layers, **self.rest)


def choice(
    ctx: typer.Context,
    ratio: Ratio = None,
    target_params: TargetParams = None,
    unit_ratio: UnitRatio = None,
    kinds: Kinds = "mlp",
    layers: Layers = None,
    round_to: RoundTo = 1,
    importance: Importance = "taylor",
    variant: Variant = None,
    reduction: Reduction = "sum",
    allocation: Allocation = "uniform",
    steps: Steps = 1,
    calibration: Calibration = "self",
    samples: Samples = 10,
    length: Length = 64,
    seed: Seed = 0,
) -> Choice | None:
    """The options of choice; None when nothing says how much (only ``prune --plan`` accepts that)."""
    from ..importance.reductions import REDUCTION_NAMES
    from ..selection.allocate import ALLOCATIONS

    if ratio is None and target_params is None and unit_ratio is None:
        return None
    if reduction not in REDUCTION_NAMES:
        raise UnknownNameError("reduction", reduction, REDUCTION_NAMES)
    if allocation not in ALLOCATIONS:
        raise UnknownNameError("allocation", allocation, ALLOCATIONS)
    rest = {
        "round_to": round_to,
        "reduction": reduction,
        "allocation": allocation,
        "steps": steps,
        "calibration": calibration,
        "samples": samples,
        "length": length,
        "seed": seed,
    }
    criterion = catalog_of(ctx).criteria[importance](variant)
    target = parse_target(ratio, target_params, unit_ratio)
    return Choice(criterion, target, parse_names(kinds, "--kinds"), layers, rest)


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
    if chosen is None:
        raise SelectionError(HOW_MUCH)
    if output is not None:
        new_file(output)
    loaded = open_model(ctx, model, options)
    made = _make(loaded, chosen)
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
    as_json: Json = False,
) -> None:
    """Remove the least important structures and write an ordinary Hugging Face directory.

    Importance is measured as in LLM-Pruner (Ma, Fang, Wang, NeurIPS 2023); no training corpus is needed.
    """
    from ..pipeline import apply_plan, save

    started = time.monotonic()
    if (chosen is None) == (plan_file is None):
        raise SelectionError(HOW_MUCH if chosen is None else "--plan says how much already; leave out the amount")
    replayed = None if plan_file is None else PruningPlan.load(plan_file)
    new_directory(output)
    loaded = open_model(ctx, model, options)
    made = replayed or _make(loaded, cast("Choice", chosen))
    made.check(loaded.graph)
    result = plan_result(loaded, made)
    note("cutting and saving")
    kind = save(apply_plan(loaded, made), output)
    result |= {"output": str(output), "checkpoint": kind, "seconds": round(time.monotonic() - started, 1)}
    if as_json:
        print_json({"plan": made.model_dump(mode="json"), "result": result})
        return
    show_plan(loaded.graph, made, result)
    needs = "and trust_remote_code=True, or llmpruner.load_pruned" if kind == "shim" else "as any model does"
    out.print(f"[bold green]✓[/] {output} in {result['seconds']} s; loads with from_pretrained {needs}")


def _make(loaded: LoadedModel, chosen: Choice) -> PruningPlan:
    from ..pipeline import make_plan

    return make_plan(loaded, chosen.criterion, chosen.settings(loaded), RichProgress())


def plan_result(loaded: LoadedModel, made: PruningPlan) -> dict[str, Any]:
    """What the plan leaves, in parameters and bytes."""
    graph, width = loaded.graph, int(next(loaded.model.parameters()).element_size())
    total, decoder = parameters_after(graph, made.kept)
    return {
        "parameters_before": graph.total_parameters,
        "parameters_after": total,
        "decoder_before": graph.decoder_parameters,
        "decoder_after": decoder,
        "decoder_removed": 1 - decoder / graph.decoder_parameters,
        "bytes_before": graph.total_parameters * width,
        "bytes_after": total * width,
    }


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
    table(
        "Result",
        ("", "Before", "After", "Removed"),
        [
            _row("Decoder parameters", result["decoder_before"], result["decoder_after"], count),
            _row("All parameters", result["parameters_before"], result["parameters_after"], count),
            _row("Weights", result["bytes_before"], result["bytes_after"], size),
        ],
    )


def _row(label: str, before: float, after: float, text: Any) -> tuple[str, str, str, str]:
    return label, text(before), text(after), f"{1 - after / before:.2%}"
