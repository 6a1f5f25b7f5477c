"""Prune or quantise? Bits per byte and speed in llama.cpp against bytes of a GGUF file: of a dense model quantised to
more and fewer bits, and of the same with fewer tokens, without a fifth of its decoder, and recovered.

    LLMPRUNER_DATA=… LLMPRUNER_MODELS=… python -m benchmarks.choose FOLDER [--model NAME] [--only ROW …]
    python -m benchmarks.choose --render

Needs llama-cpp-python and an idle machine. FOLDER keeps the models, which are those of `benchmarks.tasks`, and
``results/choose.jsonl`` the rows, so that an interrupted run goes on where it stopped. Table and picture are those of
``docs/how-to/choose.md``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from .gguf_sizes import facts
from .measure import as_json, evaluated, machine, run, write_table
from .quality import MODELS, ROOT, version
from .tasks import FEWER_TOKENS, RECOVERED, made
from .vocabulary import measured_texts

RESULTS = ROOT / "benchmarks" / "results" / "choose.jsonl"
PAGE = ROOT / "docs" / "how-to" / "choose.md"
PICTURE = ROOT / "docs" / "pictures" / "choose.svg"
QUANTS = ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")
BASES = {
    "dense": QUANTS, FEWER_TOKENS: ("q8_0", "q4_k_m", "q3_k_m"), "best": ("q8_0", "q4_k_m", "q3_k_m"),
    f"best{RECOVERED}": ("q8_0", "q4_k_m", "q3_k_m"),
}  # fmt: skip
"""Model of `benchmarks.tasks` → the types that it is stored in."""
LABELS = {
    "dense": "quantised only", FEWER_TOKENS: "fewer tokens", "best": "−20 % of the decoder",
    f"best{RECOVERED}": "the same, recovered",
}  # fmt: skip
COLOURS = dict(zip(BASES, ("#444444", "#d1495b", "#b9b6ad", "#00798c"), strict=True))
BATCHES = (1, 8)
SPEED = ("--runtime", "llama-cpp", "--batch", ",".join(map(str, BATCHES)), "--prompt", "256", "--new", "32")
BYTES = 12_000
"""Of each text."""
LOST = "Chinese"
"""Of the texts, the one whose tokens go: it is not in the mean."""
HIGHEST = 1.6
"""Of the picture; what is above is drawn there."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="keeps the models")
    parser.add_argument("--model", choices=list(MODELS)[1:], default=list(MODELS)[1])
    parser.add_argument("--only", nargs="*", choices=BASES, default=list(BASES))
    parser.add_argument("--render", action="store_true", help="only write table and picture")
    options = parser.parse_args()
    if not options.render:
        work = options.folder / options.model
        work.mkdir(parents=True, exist_ok=True)
        measure(options.model, options.only, work)
    write_table(PAGE, "choose", table(read()))
    PICTURE.write_text(picture(read()), encoding="utf-8")


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def measure(model: str, bases: Sequence[str], work: Path) -> None:
    for base in bases:
        for quant in BASES[base]:
            if any((row["model"], row["base"], row["quant"]) == (model, base, quant) for row in read()):
                continue
            row = {"model": model, "base": base, "quant": quant, "commit": version(), "machine": machine()}
            row |= measured(exported(made(model, base, work)[0], quant, work))
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(as_json(row), flush=True)


def exported(path: str, quant: str, work: Path) -> Path:
    """A model as a GGUF file."""
    output = work / "exported"
    shutil.rmtree(output, ignore_errors=True)
    chosen = "gguf.type=f16" if quant == "f16" else f"gguf.quant={quant}"
    run("export", path, "--to", "gguf", "--set", chosen, "-o", str(output))
    (file,) = output.glob("*.gguf")
    return file


def measured(file: Path) -> dict[str, Any]:
    texts = measured_texts(BYTES)
    result = evaluated(str(file), "--metrics", "answers", texts=texts)
    report = file.with_name("bench.json")
    run("bench", str(file), *SPEED, "--rounds", "5", "--json", str(report))
    speed = {
        str(case["batch"]): {s: case["models"][0][s]["tokens_per_second"]["median"] for s in ("prefill", "decode")}
        for case in json.loads(report.read_text())["cases"]
    }
    return {
        **facts(file),
        "bits_per_byte": {name: text["bits_per_byte"] for name, text in result["perplexity"].items()},
        "asked": {name: result["answers"][name] for name in ("repeat_themselves", "cut_off")},
        "speed": speed,
    }  # fmt: skip


def mean_bits(row: dict[str, Any], f16: dict[str, Any]) -> float:
    """Of the texts but `LOST`, in proportion to those of the dense model in 16 bits."""
    bits, dense = row["bits_per_byte"], f16["bits_per_byte"]
    return fmean(bits[name] / dense[name] for name in bits if name != LOST)


def by_model(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Of each model its rows, the dense one in 16 bits first."""
    found = {model: [row for row in rows if row["model"] == model] for model in MODELS}
    order = [(base, quant) for base in BASES for quant in BASES[base]]
    return {
        model: sorted(of_model, key=lambda row: order.index((row["base"], row["quant"])))
        for model, of_model in found.items()
        if of_model
    }


def table(rows: list[dict[str, Any]]) -> str:
    texts, speeds = list(rows[0]["bits_per_byte"]), [(b, part) for b in BATCHES for part in ("prefill", "decode")]
    heads = ["model", "", "type", "MB", "bits per weight", *texts, "mean", "repeat", "cut off"]
    heads += [f"{'prompt' if part == 'prefill' else 'text'}, batch {b}" for b, part in speeds]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for model, of_model in by_model(rows).items():
        for row in of_model:
            cells = [model, LABELS[row["base"]], row["quant"], f"{row['bytes'] / 1e6:,.0f}", f"{row['bits']:.2f}"]
            cells += [f"{row['bits_per_byte'][name]:.3f}" for name in texts]
            cells += [f"{mean_bits(row, of_model[0]):.3f}", *(f"{value:.0%}" for value in row["asked"].values())]
            cells += [f"{row['speed'][str(b)][part]:.0f}" for b, part in speeds]
            lines.append(f"| {' | '.join(cells)} |")
    on = rows[0]["machine"]
    commits = ", ".join(
        f"{'/'.join(sorted({row['commit'] for row in of_model}))} ({model})"
        for model, of_model in by_model(rows).items()
    )
    about = f"{on['cpu']}, {on['cores']} cores; commit {commits}; `python -m benchmarks.choose`."
    return "\n".join([*lines, "", about])


def picture(rows: list[dict[str, Any]]) -> str:
    """Of each model a panel, and below them what their lines are."""
    panels, labels = by_model(rows), []
    for number, base in enumerate(base for base in BASES if any(row["base"] == base for row in rows)):
        x = 56 + 165 * number
        labels.append(f'<circle cx="{x}" cy="308" r="4" fill="{COLOURS[base]}"/>')
        labels.append(f'<text x="{x + 10}" y="312">{LABELS[base]}</text>')
    width = max(380 * len(panels), 740)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 330" width="{width}" height="330" '
            'role="img" font-family="system-ui, sans-serif" font-size="13" fill="#222222">',
            "<title>Bits per byte in proportion to those of the dense model, by the size of the file</title>",
            f'<rect width="{width}" height="330" rx="8" fill="#fafaf8"/>',
            *(part for n, (model, found) in enumerate(panels.items()) for part in panel(model, found, 56 + 380 * n)),
            *labels,
            "</svg>",
            "",
        ]
    )


def panel(model: str, rows: list[dict[str, Any]], left: int) -> list[str]:
    """File size against `mean_bits`, a line for what was removed; of 8 bits and fewer, up to `HIGHEST`."""
    points = [(row, row["bytes"] / 1e6, min(mean_bits(row, rows[0]), HIGHEST)) for row in rows if row["quant"] != "f16"]
    small, large = min(x for _, x, _ in points), max(x for _, x, _ in points)
    top = max(y for *_, y in points)

    def place(x: float, y: float) -> tuple[int, int]:
        return round(left + 290 * (x - small) / (large - small)), round(262 - 190 * (y - 1) / (top - 1))

    parts = [
        f'<text x="{left}" y="30" font-size="15" font-weight="600">{model}</text>',
        f'<text x="{left}" y="50" fill="#666666">bits per byte; the dense model in 16 bits is 1</text>',
        f'<text x="{left}" y="284" fill="#666666">{small:,.0f} MB</text>',
        f'<text x="{left + 290}" y="284" text-anchor="end" fill="#666666">{large:,.0f} MB</text>',
    ]
    for y in (1.0, (1 + top) / 2, top):
        at = place(small, y)[1] + 4
        parts.append(f'<text x="{left - 8}" y="{at}" text-anchor="end" fill="#666666">{y:.2f}</text>')
    for base, colour in COLOURS.items():
        line = [(*place(x, y), row["quant"]) for row, x, y in points if row["base"] == base]
        if not line:
            continue
        path = " ".join(f"{x},{y}" for x, y, _ in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>' for x, y, _ in line]
        if base == "dense":
            parts += [f'<text x="{x + 4}" y="{y - 8}" font-size="11">{quant}</text>' for x, y, quant in line]
    return parts


if __name__ == "__main__":
    main()
