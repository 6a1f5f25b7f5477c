"""Reports of the real model: six prunes compared on one page, held to what ``evaluate`` wrote, and the warning about
weights that were fitted to one kind of text.

    LLMPRUNER_DATA=… python -m benchmarks.reports FOLDER

``FOLDER``: takes checkpoints, results and pages; checkpoints and results of an earlier call are used again. Writes
``results/reports.json``. Fails where a page says anything else than ``evaluate``, or warns of the wrong model.
``LLMPRUNER_REPORTS=FOLDER`` then has ``tests/unit/test_report_browser.py`` open its pages, too.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
from collections.abc import Mapping, Sequence
from html import unescape
from itertools import product
from math import log, prod
from pathlib import Path
from typing import Any

from .measure import as_json, data_folder, instructions, machine, run

RESULTS = Path(__file__).parent / "results" / "reports.json"
TOKENS, COMPARED_TOKENS, WINDOW = 2048, 1024, 512
"""Of each text: for the warning, for the comparison, in a window."""
PAGE = "compared.html"
RATIOS = (0.1, 0.2, 0.3)
METHODS = {"fast": ("--samples", "16", "--length", "128"), "llm-pruner": ()}
_SMALL = ("--method", "best", "--ratio", "0.2", "--samples", "16", "--length", "256")
WIKITEXT = "{data}/wikitext2_unk_validation.jsonl"
COMPARED = {
    f"{method}-{100 * ratio:.0f}": (
        "--method", method, "--ratio", str(ratio), *options, "--calibration", WIKITEXT,
    )
    for (method, options), ratio in product(METHODS.items(), RATIOS)
}  # fmt: skip
FITTED = {
    "best-wikitext": (*_SMALL, "--calibration", WIKITEXT),
    "best-self": (*_SMALL, "--calibration", "self"),
}
WARNED = {"best-wikitext": True, "best-self": False}
"""Whether the page of the checkpoint is to have a warning."""
PIXELS = 0.2
"""By which a place in the chart may be off: it is rounded to a tenth."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    data = data_folder()
    folder.mkdir(parents=True, exist_ok=True)
    for name, options in (COMPARED | FITTED).items():
        if not (folder / name).is_dir():
            filled = [option.format(data=data) for option in options]
            run("prune", "demo", *filled, "--dtype", "float32", "--no-report", "-o", str(folder / name), timeout=7200)
    texts = data / "wikitext2_unk_test.txt", folder / "instructions.txt"
    texts[1].write_text(instructions(data), encoding="utf-8")
    found = {
        "machine": machine(), "compared": compared(folder, texts[0]),
        "warnings": {name: warnings(folder, name, *texts) for name in FITTED},
    }  # fmt: skip
    text = as_json(found).replace(str(folder), "$FOLDER").replace(str(data), "$LLMPRUNER_DATA")
    RESULTS.write_text(text, encoding="utf-8")
    print(text)
    wrong = [name for name, one in found["warnings"].items() if bool(one["warnings"]) != WARNED[name]]
    if wrong:
        raise SystemExit(f"the warning is missing or out of place: {', '.join(wrong)}")


def evaluated(file: Path, models: Sequence[Path], texts: Sequence[Path], tokens: int) -> dict[str, Any]:
    """Name → what ``evaluate --json`` wrote of the dense model (``demo``) and of ``models``, to ``file`` or earlier."""
    if not file.is_file():
        options = ("--kl", "--set", f"perplexity.tokens={tokens}", "--window", str(WINDOW), "--dtype", "float32")
        options = (*options, "--set", "perplexity.autocast=true")
        where = ("--perplexity", ",".join(map(str, texts)))
        run("evaluate", "demo", *map(str, models), *where, *options, "--json", str(file), timeout=14400)
    return {Path(one["name"]).name: one for one in json.loads(file.read_text(encoding="utf-8"))}


def compared(folder: Path, text: Path) -> list[dict[str, Any]]:
    """What the page of the six says, after it was compared with their files."""
    files, models = [], {}
    for ratio in RATIOS:
        names = [f"{method}-{100 * ratio:.0f}" for method in METHODS]
        files.append(folder / f"compared-{100 * ratio:.0f}.json")
        models |= evaluated(files[-1], [folder / name for name in names], [text], COMPARED_TOKENS)
    results = [part for file in files for part in ("--results", str(file))]
    done = run("report", *(str(folder / name) for name in COMPARED), *results, "-o", str(folder / PAGE), "--json")
    page = (folder / PAGE).read_text(encoding="utf-8")
    rows = table(page)
    points = {name: (decoder_parameters(folder / name), models[name]["perplexity"]["perplexity"]) for name in COMPARED}
    whole = rows[0]["Decoder parameters"][1] / (1 - rows[0]["Decoder removed"][1])
    pareto = [
        name for name, (size, value) in points.items()
        if not any(s <= size and v <= value and (s, v) != (size, value) for s, v in points.values())
    ]  # fmt: skip
    for facts in json.loads(done["output"])["models"]:
        measured = {one["name"]: one for one in facts["measured"][0]["models"]}
        same(measured["dense"]["perplexity"], models["demo"]["perplexity"], "dense model in --json")
        same(measured[facts["name"]]["perplexity"], models[facts["name"]]["perplexity"], f"{facts['name']} in --json")
    same([row["Model"][0] for row in rows], list(COMPARED), "models")
    for row in rows:
        name = row["Model"][0]
        size, value = points[name]
        same(row["Decoder parameters"], (f"{size / 1e6:.2f} M", size), f"parameters of {name}")
        same(row["Perplexity"], (f"{value:,.2f}", value), f"perplexity of {name}")
        kl = models[name]["perplexity"]["kl_per_token"]
        same(row["KL per token"], (f"{kl:.4f}", kl), f"divergence of {name}")
        same(row["Pareto"][0], "yes" if name in pareto else "no", f"Pareto mark of {name}")
    curve(page, {**points, "dense": (round(whole), models["demo"]["perplexity"]["perplexity"])}, pareto)
    return [
        {
            "name": name, "command": command_of(folder / name), "decoder_parameters": points[name][0],
            "decoder_removed": row["Decoder removed"][1], "perplexity": points[name][1],
            "kl_per_token": row["KL per token"][1], "pareto": name in pareto,
        }
        for name, row in zip(COMPARED, rows, strict=True)
    ]  # fmt: skip


def warnings(folder: Path, name: str, *texts: Path) -> dict[str, Any]:
    """By how much the loss rose on each text, in nats per token, and what the page of the checkpoint warns of."""
    file, results = folder / f"{name}.html", folder / f"{name}.json"
    models = evaluated(results, [folder / name], texts, TOKENS)
    run("report", str(folder / name), "--results", str(results), "-o", str(file))
    before, after = perplexities(models["demo"]), perplexities(models[name])
    found = re.findall(r'<p class="warning">(.*?)</p>', file.read_text(encoding="utf-8"), re.DOTALL)
    return {
        "command": command_of(folder / name), "perplexity": after,
        "rise": {text: round(log(after[text] / before[text]), 4) for text in after},
        "warnings": [plain(text) for text in found],
    }  # fmt: skip


def perplexities(result: Mapping[str, Any]) -> dict[str, float]:
    first = result["perplexity"]
    others = {text: one["perplexity"] for text, one in first["others"].items()}
    return {Path(text).name: value for text, value in {first["text"]: first["perplexity"], **others}.items()}


def table(page: str) -> list[dict[str, tuple[str, Any]]]:
    """The rows of the table to sort: column → text and value."""
    head, body = re.search(r'<table class="sort">.*?<thead>(.*?)</thead>(.*?)</table>', page, re.DOTALL).groups()  # type: ignore[union-attr]
    columns = [plain(text) for text in re.findall(r"<th[^>]*>(.*?)</th>", head)]
    cells = r'<t[hd][^>]* data-value="([^"]*)">(.*?)</t[hd]>'
    rows = [re.findall(cells, row) for row in re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)]
    return [{c: (plain(t), number(v)) for c, (v, t) in zip(columns, row, strict=True)} for row in rows]


def curve(page: str, points: Mapping[str, tuple[int, float]], pareto: Sequence[str]) -> None:
    """Raises where a point of the chart is not at its place between the labels of the axes."""
    chart = re.search(r'<svg class="chart".*?</svg>', page, re.DOTALL)[0]  # type: ignore[index]
    label = r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="{}">([\d.,]+)</text>'
    across = [(float(x), number(text)) for x, _, text in re.findall(label.format("middle"), chart)]
    up = [(float(y) - 4, number(text)) for _, y, text in re.findall(label.format("end"), chart)]
    circle = r'<circle cx="([\d.]+)" cy="([\d.]+)" r="3.5"><title>(\S+):'
    drawn = {name: (float(x), float(y)) for x, y, name in re.findall(circle, chart)}
    same(sorted(drawn), sorted(points), "points of the chart")
    straight(across + [(drawn[name][0], size / 1e6) for name, (size, _) in points.items()], "parameters in the chart")
    heights = up + [(drawn[name][1], value) for name, (_, value) in points.items()]
    # The page says by its labels alone whether an axis is logarithmic.
    logarithmic = abs((up[2][0] - up[1][0]) - (up[1][0] - up[0][0])) > 2 * PIXELS or len(up) < 3
    straight([(at, log(value) if logarithmic else value) for at, value in heights], "perplexities in the chart")
    rings = {(float(x), float(y)) for x, y in re.findall(r'<circle class="ring" cx="([\d.]+)" cy="([\d.]+)"', chart)}
    same(rings, {drawn[name] for name in pareto}, "rings of the chart")


def straight(places: Sequence[tuple[float, float]], what: str) -> None:
    """Raises where ``places`` (pixels, value) are not on one straight line."""
    (low, first), (high, last) = min(places, key=lambda p: p[1]), max(places, key=lambda p: p[1])
    for at, value in places:
        expected = low + (value - first) / (last - first) * (high - low)
        if abs(at - expected) > PIXELS:
            raise SystemExit(f"{what}: {value:g} is drawn at {at}, expected {expected:.1f}")


def decoder_parameters(checkpoint: Path) -> int:
    """Counted from the headers of the weight files: of the layers."""
    found = 0
    for file in checkpoint.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        shapes = {name: one["shape"] for name, one in header.items() if name != "__metadata__"}
        found += sum(prod(shape) for name, shape in shapes.items() if ".layers." in name)
    return found


def command_of(checkpoint: Path) -> dict[str, Any]:
    """The settings of the prune as its record has them, and the seconds of its stages."""
    record = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
    return {"settings": record["settings"], "seconds": round(sum(one["seconds"] for one in record["stages"]), 1)}


def same(found: Any, expected: Any, what: str) -> None:
    if found != expected:
        raise SystemExit(f"{what}: the page says {found}, expected {expected}")


def plain(html: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", html)).strip()


def number(text: str) -> Any:
    """The number that ``text`` is, or else the text."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return text
    return int(value) if value.is_integer() else value


if __name__ == "__main__":
    main()
