"""Bits per byte of real models with fewer tokens, without training, on texts that no token was counted on.

    LLMPRUNER_DATA=… LLMPRUNER_MODELS=… python -m benchmarks.vocabulary [MODEL …]

Tokens are counted on C4, WikiText-2's validation part, instructions, and Python's standard library. Rows are kept in
``results/vocabulary.json``, so that an interrupted run goes on where it stopped; at the end the table is printed.
"""

from __future__ import annotations

import json
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import real_models
from .measure import as_json, data_folder, instructions, machine, run

RESULTS = Path(__file__).parent / "results" / "vocabulary.json"
MODELS: dict[str, Callable[[], str]] = {
    "SmolLM2-135M": lambda: "demo",
    "Qwen2.5-Coder-0.5B": lambda: str(real_models.qwen()),
}
TOKENS = {"SmolLM2-135M": (40960, 32768, 24576), "Qwen2.5-Coder-0.5B": (98304, 65536, 50688)}
BYTES = 24_000
"""Of each text that is measured."""
SAMPLES, LENGTH = 1024, 512


def main() -> None:
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        texts, counted = measured_texts(Path(folder)), counted_text(Path(folder))
        for name in sys.argv[1:] or MODELS:
            model = str(MODELS[name]())
            rows = results.setdefault(name, {"machine": machine()})
            for tokens in (0, *TOKENS[name]):
                if str(tokens) not in rows:
                    rows[str(tokens)] = measured(model, tokens, texts, counted, Path(folder))
                    RESULTS.write_text(as_json(results))
    print(table(results))


def measured(model: str, tokens: int, texts: dict[str, Path], counted: str, folder: Path) -> dict[str, Any]:
    """Bits per byte on every text, and the share of parameters that is gone. ``tokens``: to keep; 0 for all."""
    cut: dict[str, Any] = {}
    if tokens:
        options = ("--kinds", "vocabulary", "--set", f"vocabulary.tokens={tokens}", "--calibration", counted)
        options = (*options, "--samples", str(SAMPLES), "--set", f"prune.length={LENGTH}", "--dtype", "float32")
        cut = run("prune", model, *options, "-o", f"{folder}/{tokens}", "--json", timeout=7200)
        result = json.loads(cut.pop("output"))["result"]
        cut |= {"gone": 1 - result["parameters_after"] / result["parameters_before"]}
        cut["command"] = cut["command"].replace(str(folder), "$WORK").replace(str(data_folder()), "$LLMPRUNER_DATA")
        model = f"{folder}/{tokens}"
    file = folder / "evaluation.json"
    options = ("--perplexity", ",".join(map(str, texts.values())), "--dtype", "float32", "--json", str(file))
    run("evaluate", model, *options, timeout=7200)
    (found,) = json.loads(file.read_text())
    by_file = {found["perplexity"]["text"]: found["perplexity"], **found["perplexity"]["others"]}
    return {**cut, "bits_per_byte": {name: by_file[str(path)]["bits_per_byte"] for name, path in texts.items()}}


def measured_texts(folder: Path) -> dict[str, Path]:
    data = data_folder()
    texts = {
        "WikiText-2": "\n\n".join(fields(data / "wikitext2_raw_test.jsonl", "page")),
        "instructions": instructions(data),
        "Python": "\n\n".join(sources(Path(next(iter(find_spec("jinja2").submodule_search_locations))))),
        "roleplay": "\n\n".join(fields(data / "gpteacher_roleplay_en.jsonl", "output")),
        "Chinese": "\n\n".join(fields(data / "alpaca_gpt4_zh_1k.jsonl", "output")),
    }
    for name, text in texts.items():
        path = folder / f"{name}.txt"
        path.write_text(text.encode()[:BYTES].decode(errors="ignore"), encoding="utf-8")
        texts[name] = path
    return texts


def counted_text(folder: Path) -> str:
    """The value of ``--calibration``."""
    data, code = data_folder(), folder / "library.jsonl"
    files = sources(Path(sysconfig.get_path("stdlib")))
    code.write_text("\n".join(json.dumps({"text": text}) for text in files), encoding="utf-8")
    names = ("c4_sample_300.jsonl", "wikitext2_unk_validation.jsonl")
    return ",".join((*(str(data / name) for name in names), f"chat:{data / 'alpaca_en_1k.jsonl'}", str(code)))


def fields(path: Path, name: str) -> list[str]:
    return [json.loads(line)[name] for line in path.read_text(encoding="utf-8").splitlines()]


def sources(folder: Path) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")) if path.stat().st_size > 2000]


def table(results: dict[str, Any]) -> str:
    names = [name for rows in results.values() for name in rows["0"]["bits_per_byte"]]
    lines = [f"| model | tokens | parameters gone | {' | '.join(dict.fromkeys(names))} |", "|---" * 8 + "|"]
    for model, rows in results.items():
        dense = rows["0"]["bits_per_byte"]
        for tokens in (t for t in rows if t != "machine"):
            row = rows[tokens]
            cells = [
                f"{v:.3f}" + (f" ({v / dense[n]:.3f})" if tokens != "0" else "")
                for n, v in row["bits_per_byte"].items()
            ]
            gone = f"{row['gone']:.1%}" if "gone" in row else ""
            lines.append(
                f"| {model} | {int(tokens) or 'all':,} | {gone} | {' | '.join(cells)} |"
                if tokens != "0"
                else f"| {model} | all | | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
