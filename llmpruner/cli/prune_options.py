"""The options of ``plan`` and ``prune`` that say how much goes and how it is chosen, with their help."""

from __future__ import annotations

from typing import Annotated

import typer

from ..methods.presets import BEST, BY_HAND, FAST

_WHAT, _HOW, _ON = "How much", "How to choose", "Calibration"

Ratio = Annotated[
    float | None,
    typer.Option(help="Share of the --budget to remove, hit within one unit.", rich_help_panel=_WHAT),
]
Budget = Annotated[
    str,
    typer.Option(
        help="What --ratio is a share of: decoder (its parameters), parameters (all of them), bytes (of all weights), "
        "macs (multiply-accumulate operations per token), kv-cache (its bytes per token) or latency (per decoded "
        "token, measured on this machine). All kinds compete under it; what saves nothing of it stays.",
        rich_help_panel=_WHAT,
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        min=1, help="Tokens in the cache under --budget macs or latency: 512 unless said.", rich_help_panel=_WHAT
    ),
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
        "zscore, parameters (per parameter removed), cost (per share of the --budget removed).",
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
        help="uniform: equal shares per layer and kind; global: one ranking over all units; sensitivity: by the "
        "divergence that cuts of each group cause alone; search: equal shares, moved to where cuts hurt least in "
        "company (minutes more).",
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
        "text or page field, or a datasets name (name:config:split); several, with commas between them, are mixed.",
        rich_help_panel=_ON,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        min=1,
        help=f"Calibration samples: {BEST.samples} for best ({BEST.amount(writes=True)[0]} that the model writes), "
        f"{FAST.samples} for fast, else {BY_HAND.samples}.",
        rich_help_panel=_ON,
    ),
]
Length = Annotated[
    int | None,
    typer.Option(
        min=2,
        help=f"Tokens per sample: {BEST.length} for best, {FAST.length} for fast, else {BY_HAND.length}.",
        rich_help_panel=_ON,
    ),
]
