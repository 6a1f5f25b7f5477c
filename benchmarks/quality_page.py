"""The page, the plot and the README's table of the benchmark `quality`."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

from . import ablation, ordering, plots
from .measure import TOKENS, WINDOW
from .quality_rows import METHODS, NAMES, RATIOS, SHAPES, TEXTS, Row, points_of, row_of

PAGE = Path(__file__).parents[1] / "docs" / "quality.md"
PLOT = Path(__file__).parents[1] / "docs" / "quality.svg"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
TASKS = ("piqa", "arc_easy", "openbookqa")


def answers_of(tokens: int) -> int:
    """Number of examples whose answers in the chat format are measured, beside so many tokens of other texts."""
    return tokens // 100


def draw(done: dict[str, dict[str, Any]]) -> None:
    """The tables and the plot of ``docs/quality.md`` and the README."""
    dense = done.get(Row("dense", 0.0, "").key)
    if dense is None:
        return
    PAGE.write_text(page(done), encoding="utf-8")
    head, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    README.write_text(f"{head}{BEGIN}\n{overview(done)}{END}{tail}", encoding="utf-8")
    _plot(dense["perplexity"], points_of(done))


def overview(done: dict[str, dict[str, Any]]) -> str:
    """The README's tables: the default first, then what it can be compared with."""
    return "\n".join([*_at_one_ratio(done), "", *_over_ratios(done), "", *_other_models(done)]) + "\n"


def _at_one_ratio(done: dict[str, dict[str, Any]], ratio: float = 0.2) -> list[str]:
    """Perplexity and divergence of the demo model on every text, by method and calibration text."""
    lines = [
        f"{ratio:.0%} of the decoder removed: perplexity and, in parentheses, divergence:",
        "",
        f"| shape | method | calibrated on | {' | '.join(COLUMNS.values())} |",
        "|---" * (3 + len(COLUMNS)) + "|",
        f"| | dense | | {' | '.join(_cells(done[Row('dense', 0.0, '').key]))} |",
    ]
    for shape, text, method in product(SHAPES, TEXTS, METHODS):
        entry = done.get(Row(method, ratio, text, shape).key)
        if entry and "texts" in entry:
            lines.append(f"| {shape} | {method} | {text} | {' | '.join(_cells(entry))} |")
    return lines


def _over_ratios(done: dict[str, dict[str, Any]], least: int = 3) -> list[str]:
    """WikiText-2 perplexity of the demo model, for what was measured at ``least`` ratios or more."""
    dense = done[Row("dense", 0.0, "").key]
    lines = [
        "Other ratios, on WikiText-2:",
        "",
        "| shape | method | calibrated on | " + " | ".join(f"{ratio:.0%}" for ratio in RATIOS) + " |",
        "|---" * (3 + len(RATIOS)) + "|",
        "| | dense | | " + " | ".join([f"{dense['perplexity']:.2f}"] * len(RATIOS)) + " |",
    ]
    for shape, text, method in product(SHAPES, TEXTS, METHODS):
        found = [done.get(Row(method, ratio, text, shape).key) for ratio in RATIOS]
        if sum(entry is not None for entry in found) >= least:
            cells = [f"{e['perplexity']:.2f}" if e else "" for e in found]
            lines.append(f"| {shape} | {method} | {text} | " + " | ".join(cells) + " |")
    return lines


def _other_models(done: dict[str, dict[str, Any]], text: str = "C4 sample") -> list[str]:
    """Every method on the other models, calibrated on one text, on two texts by ratio."""
    lines = []
    for model in dict.fromkeys(row_of(entry).model for entry in done.values() if row_of(entry).model != "demo"):
        points = [entry for entry in points_of(done, model) if row_of(entry).text == text]
        ratios = sorted({row_of(entry).ratio for entry in points})
        heads = [f"{name}, {ratio:.0%}" for ratio in ratios for name in ("WikiText-2", "C4")]
        lines += [
            f"{NAMES.get(model, model)}, calibrated on {text}:",
            "",
            f"| shape | cut | method | {' | '.join(heads)} |",
            "|---" * (3 + len(heads)) + "|",
            f"| | | dense | {' | '.join(_cells(done[Row('dense', 0.0, '', model=model).key])[:2] * len(ratios))} |",
        ]
        by_ratio: dict[tuple[str, str, str], dict[float, list[str]]] = {}
        for entry in sorted(points, key=lambda e: (row_of(e).shape == "free", _place(row_of(e).method))):
            row = row_of(entry)
            by_ratio.setdefault((row.shape, KINDS[row.kinds], _named(row)), {})[row.ratio] = _cells(entry)[:2]
        for what, cells in by_ratio.items():
            measured = [cell for ratio in ratios for cell in cells.get(ratio, ["", ""])]
            lines.append(f"| {' | '.join((*what, *measured))} |")
    return lines


def _named(row: Row) -> str:
    """The method, and its number of samples where that is not its own."""
    return row.method + (f", {row.samples} samples" if row.samples else "")


def _place(method: str) -> int:
    """The default first, and what is of other papers last."""
    return METHODS.index(method) if method in METHODS else len(METHODS)


def page(done: dict[str, dict[str, Any]]) -> str:
    """``docs/quality.md``"""
    models = list(dict.fromkeys(row_of(entry).model for entry in done.values()))
    lines = [
        "# Quality for size",
        "",
        "<!-- Written by benchmarks/quality.py; do not edit. -->",
        "",
        "Models after the cut, without training. *Shape*: uniform (the default), every layer of one width, or free, "
        "with the layers of both ends whole. *Method*: best by energy is `--method best --importance energy`, as best "
        "was before it chose units by `fisher`. *Cut*: MLP channels, KV heads with their query heads, or whole layers. "
        "*Ratio*: share of the decoder's parameters that was asked for, then that was removed. Each text has its "
        "perplexity and, in parentheses, the mean divergence (KL) from the dense model per token, in nats, where it "
        f"was measured: the first tokens of the text in windows of {WINDOW}, float32 weights, bfloat16 products. None "
        "of the texts was used for calibration: WikiText-2's test part (unknown words as `<unk>`), documents of C4, "
        "answers to instructions, each after its instruction in the model's chat format with the loss on "
        "the answer, the same set's answers as plain text, and modules of Python's standard library. Seconds: the "
        "whole `prune` command.",
    ]
    for model in models:
        points = points_of(done, model)
        if not points:
            continue
        lines += ["", f"## {NAMES.get(model, model)}", ""]
        if model == "demo":
            lines += ["![Perplexity over the share of parameters removed](quality.svg)", ""]
        dense = done[Row("dense", 0.0, "", model=model).key]
        tokens = dense.get("tokens", TOKENS)
        lines += [f"{tokens:,} tokens of each text, {answers_of(tokens)} answers in chat.", ""]
        lines += _points(dense, points)
        lines += _tasks([dense, *sorted(points, key=lambda e: e["perplexity"])])
    lines += _no_gain()
    lines += _ordering()
    return "\n".join(lines) + "\n"


COLUMNS = {
    "WikiText-2": "WikiText-2",
    "C4": "C4",
    "answers": "answers in chat",
    "instructions": "answers",
    "code": "code",
}
"""Text → the heading of its column."""
KINDS = {"mlp": "MLP", "mlp,attention": "MLP and heads", "layer": "layers"}


def _points(dense: dict[str, Any], points: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"| shape | cut | method | calibrated on | ratio | removed | {' | '.join(COLUMNS.values())} | seconds | "
        "peak MiB | machine |",
        "|---" * (9 + len(COLUMNS)) + "|",
        f"| | | dense | | | | {' | '.join(_cells(dense))} | | | |",
    ]
    for entry in points:
        row, seconds = row_of(entry), f"{entry['seconds']:.0f}" + ("†" if entry.get("shared") else "")
        lines.append(
            f"| {row.shape} | {KINDS[row.kinds]} | {_named(row)} | {row.text} | {row.ratio:.0%} | "
            f"{entry['decoder_removed']:.1%} | {' | '.join(_cells(entry))} | {seconds} | {entry['peak_mib']} | "
            f"{entry['machine']['cpu']}, {entry['machine']['cores']} cores |"
        )
    if any(entry.get("shared") for entry in points):
        lines += ["", "† While the machine had other work."]
    if any("texts" not in entry for entry in points):
        lines += ["", "Rows with fewer texts are of earlier versions."]
    return lines


def _cells(entry: dict[str, Any]) -> list[str]:
    """Perplexity, and divergence of a pruned model, on every text; empty where an earlier version did not measure
    it."""
    texts = entry.get("texts")
    if texts is None:
        known = {"perplexity": entry["perplexity_instructions"], "kl": 0.0}
        texts = {"WikiText-2": {"perplexity": entry["perplexity"], "kl": entry["kl"]}, "instructions": known}
    cells = []
    for name in COLUMNS:
        one = texts.get(name)
        kl = f" ({one['kl']:.3f})" if one and one["kl"] else ""
        cells.append(f"{one['perplexity']:.2f}{kl}" if one else "")
    return cells


def _tasks(entries: list[dict[str, Any]]) -> list[str]:
    """Accuracy of the models whose tasks were measured, in the order of their perplexity."""
    entries = [entry for entry in entries if "tasks" in entry]
    if not entries:
        return []
    names = TASKS
    lines = [
        "",
        "Zero-shot accuracy (lm-eval, the first rows of each task, ± its standard error), best perplexity first. "
        "*Difference*: to the dense model on the same rows, ± the standard error of the mean of the differences of the "
        "rows.",
        "",
        f"| model | rows | {' | '.join(f'{name} | difference' for name in names)} | mean |",
        "|---|---" + "|---" * (2 * len(names) + 1) + "|",
    ]
    for entry in entries:
        row, tasks = row_of(entry), entry["tasks"]
        label = "dense"
        if row.method != "dense":
            label = f"{row.method}, {row.shape}, {KINDS[row.kinds]}, {row.ratio:.0%}, {row.text}"
        cells = []
        for name in names:
            cells.append(f"{tasks[name]['acc']:.3f} ± {tasks[name]['acc_stderr']:.3f}")
            one = tasks.get("difference", {}).get(name)
            cells.append(f"{one['mean']:+.3f} ± {one['error']:.3f}" if one and one["error"] else "")
        mean = sum(tasks[name]["acc"] for name in names) / len(names)
        lines.append(f"| {label} | {tasks.get('rows', 400)} | {' | '.join(cells)} | {mean:.3f} |")
    return lines


def _no_gain() -> list[str]:
    return [
        "",
        "## What did not help",
        "",
        "Variants of the method that raised the divergence from the dense model, summed over three texts (SmolLM2, "
        "20 %, few calibration tokens, texts that only choices are made by). [All variants](quality-notes.md), also "
        "those that helped:",
        "",
        *ablation.no_gain(list(ablation.rows())),
    ]


def _ordering() -> list[str]:
    results = ordering.read()
    if not results:
        return []
    text = (
        "SmolLM2-135M-Instruct, 20 %, all else as `--method llm-pruner` has it (ten samples of 64 tokens of WikiText-2 "
        "validation, no compensation), WikiText-2 perplexity:"
    )
    return ["", "## Criteria of the paper", "", text, "", *ordering.table(results)]


def _plot(dense: float, points: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2))
    texts = dict(zip(TEXTS, ("-", "--", ":", "-."), strict=True))
    colours = dict(zip(METHODS, ("tab:green", "tab:blue", "tab:red", "tab:olive"), strict=True))
    markers = dict(zip(SHAPES, ("o", "x"), strict=True))
    for (method, colour), (text, style), (shape, marker) in product(colours.items(), texts.items(), markers.items()):
        row = {"method": method, "text": text}
        chosen = [
            e
            for e in points
            if row.items() <= e["row"].items() and row_of(e).shape == shape and row_of(e).kinds == "mlp"
        ]
        curve = sorted((e["decoder_removed"], e["perplexity"]) for e in chosen)
        if curve:
            x, y = zip((0.0, dense), *curve, strict=True)
            axes.plot(x, y, style, color=colour, marker=marker, markersize=4, label=f"{method}, {text}, {shape}")
    axes.set(xlabel="decoder parameters removed", ylabel="perplexity on WikiText-2", yscale="log")
    axes.xaxis.set_major_formatter("{x:.0%}")
    plots.save(figure, PLOT)
