"""``llmpruner plan`` and ``llmpruner prune``: the same options, without and with the cut."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..coupling import LAYER
from ..errors import ModelError, SelectionError, UnknownNameError
from ..importance.base import ImportanceCriterion
from ..loading import LoadedConfig, LoadedModel, LoadOptions
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
    from ..calibration import CalibrationSet
    from ..coupling import CouplingGraph
    from ..pipeline import PruneSettings
    from ..plan import PruningPlan, Target

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
MethodName = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="Defaults for all that follows. best (the default): chosen by one forward pass and repaired by least "
        "squares; fast: no repair; llm-pruner: the paper's, first-order Taylor on ten samples, no repair.",
        rich_help_panel=_HOW,
    ),
]
Importance = Annotated[
    str | None,
    typer.Option(
        help="Criterion: random, l1, l2, taylor, energy, wanda-sp, flap, activation, pca, obs; block-influence and "
        "angular for layers; or one that a plugin adds (see `llmpruner plugins`). Without --method: on ten samples, "
        "without repair.",
        rich_help_panel=_HOW,
    ),
]
Normalize = Annotated[
    str,
    typer.Option(
        help="How scores of different groups become comparable under --allocation global: none, mean, max, sum, "
        "zscore, parameters (per parameter removed).",
        rich_help_panel=_HOW,
    ),
]
Compensate = Annotated[
    str | None,
    typer.Option(
        help="refit: fit the weights that read cut units again, by least squares against the dense model; bias: only "
        "their biases; none.",
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
        help="Text to measure and repair on: self (the model writes it), a .txt file, a .jsonl with a "
        "text or page field, or a datasets name (name:config:split).",
        rich_help_panel=_ON,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(min=1, help="Calibration samples: 512 for best, 64 for fast, else 10.", rich_help_panel=_ON),
]
Length = Annotated[
    int | None, typer.Option(min=2, help="Tokens per sample: 128 for best and fast, else 64.", rich_help_panel=_ON)
]


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
        from ..pipeline import PruneSettings

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
    from ..importance.normalize import NORMALIZATIONS
    from ..importance.reductions import REDUCTION_NAMES
    from ..methods import BEST, BY_HAND, METHODS
    from ..pipeline import COMPENSATIONS
    from ..selection.allocate import ALLOCATIONS

    if ratio is None and target_params is None and unit_ratio is None:
        return None
    if method is not None and method not in METHODS:
        raise UnknownNameError("method", method, METHODS)
    preset = METHODS[method] if method else BY_HAND if importance else BEST
    compensate = compensate or preset.compensate
    for what, name, known in (
        ("reduction", reduction, REDUCTION_NAMES),
        ("allocation", allocation, ALLOCATIONS),
        ("normalization", normalize, NORMALIZATIONS),
        ("compensation", compensate, COMPENSATIONS),
    ):
        if name not in known:
            raise UnknownNameError(what, name, known)
    rest = {
        "round_to": round_to,
        "reduction": reduction,
        "allocation": allocation,
        "normalization": normalize,
        "steps": steps,
        "compensate": compensate,
        "calibration": calibration,
        "samples": samples or preset.samples,
        "length": length or preset.length,
        "seed": seed,
    }
    names = parse_names(kinds, "--kinds")
    default = preset.of_layers if preset.of_layers and names == (LAYER,) else preset.importance
    chosen = variant if importance else variant or preset.variant
    criterion = catalog_of(ctx).criteria[importance or default](chosen)
    target = parse_target(ratio, target_params, unit_ratio)
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
    if chosen is None:
        raise SelectionError(HOW_MUCH)
    if output is not None:
        new_file(output)
    loaded = open_model(ctx, model, options)
    made, _ = _make(loaded, chosen)
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
    from ..pipeline import apply_plan, save
    from ..plan import PruningPlan

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
    made, calibration = (replayed, None) if replayed else _make(loaded, cast("Choice", chosen))
    made.check(loaded.graph)
    result = plan_result(loaded, made)
    note("cutting and saving")
    kind = save(apply_plan(loaded, made, RichProgress(), calibration), output)
    result |= {"output": str(output), "checkpoint": kind, "seconds": round(time.monotonic() - started, 1)}
    if as_json:
        print_json({"plan": made.model_dump(mode="json"), "result": result})
        return
    show_plan(loaded.graph, made, result)
    needs = "and trust_remote_code=True, or llmpruner.load_pruned" if kind == "shim" else "as any model does"
    out.print(f"[bold green]✓[/] {output} in {result['seconds']} s; loads with from_pretrained {needs}")


def _make(loaded: LoadedModel, chosen: Choice) -> tuple[PruningPlan, CalibrationSet | None]:
    """The plan, and the calibration set for whatever follows."""
    from ..pipeline import calibrate, make_plan

    settings, progress = chosen.settings(loaded), RichProgress()
    calibration = calibrate(loaded, chosen.criterion, settings, progress)
    return make_plan(loaded, chosen.criterion, settings, progress, calibration), calibration


def plan_result(loaded: LoadedModel, made: PruningPlan) -> dict[str, Any]:
    """What the plan leaves, in parameters and bytes."""
    from ..plan import parameters_after

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
