"""Bits per byte of real models with fewer tokens, without training, on texts that no token was counted on; and of
models with a fifth fewer bytes, of channels alone and of channels and tokens.

    LLMPRUNER_DATA=… LLMPRUNER_MODELS=… python -m benchmarks.vocabulary [MODEL …]

Tokens are counted on C4, WikiText-2's validation part, instructions, and Python's standard library. Rows are kept in
``results/vocabulary.json``, so that an interrupted run goes on where it stopped; the table is written into
``docs/how-to/vocabulary.md``.
"""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import real_models
from .measure import as_json, data_folder, evaluated, instructions, machine, run, write_table

RESULTS = Path(__file__).parent / "results" / "vocabulary.json"
PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "vocabulary.md"
MODELS = {"SmolLM2-135M": lambda: "demo", "Qwen2.5-Coder-0.5B": lambda: real_models.gguf("qwen-0.5b")}
TOKENS = {"SmolLM2-135M": (40960, 32768, 24576), "Qwen2.5-Coder-0.5B": (65536, 50688)}
LATIN = {"Qwen2.5-Coder-0.5B": 98304}
"""Tokens that stay where those of other scripts go first."""
SAMPLES = ("--samples", "1024", "--set", "prune.length=512")
FIFTH = ("--ratio", "0.2", "--budget", "bytes", "--method", "fast")
BYTES = {"SmolLM2-135M": 24_000, "Qwen2.5-Coder-0.5B": 12_000}
"""Of each text that is measured; the larger model reads half as much, as it takes four times as long."""


def main() -> None:
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        counted = counted_text(Path(folder))
        for name in sys.argv[1:] or MODELS:
            model, texts = str(MODELS[name]()), measured_texts(BYTES[name])
            rows = results.setdefault(name, {"machine": machine()})
            for row, options in options_of(name).items():
                if row not in rows:
                    rows[row] = measured(model, options, texts, counted, Path(folder))
                    RESULTS.write_text(as_json(results))
    write_table(PAGE, "vocabulary", table(results))


def options_of(model: str) -> dict[str, tuple[str, ...]]:
    """Row → how the model is pruned; "dense" is not."""
    rows: dict[str, tuple[str, ...]] = {"dense": ()}
    fewer = ("--kinds", "vocabulary", *SAMPLES, "--set")
    if tokens := LATIN.get(model):
        rows[f"{tokens:,} tokens, Latin"] = (*fewer, f"vocabulary.tokens={tokens}", "--set", "vocabulary.scripts=latin")
    for tokens in TOKENS[model]:
        rows[f"{tokens:,} tokens"] = (*fewer, f"vocabulary.tokens={tokens}")
    return rows | {f"a fifth fewer bytes: {k}": ("--kinds", k, *FIFTH) for k in ("mlp", "mlp,vocabulary")}


def measured(model: str, options: tuple[str, ...], texts: dict[str, str], counted: str, folder: Path) -> dict[str, Any]:
    """Bits per byte on every text, and the share of parameters that is gone."""
    cut: dict[str, Any] = {}
    if options:
        output = folder / "pruned"
        shutil.rmtree(output, ignore_errors=True)
        options = (*options, "--calibration", counted, "--dtype", "float32")
        cut = run("prune", model, *options, "-o", str(output), "--json", timeout=7200)
        result = json.loads(cut.pop("output"))["result"]
        cut |= {"gone": 1 - result["parameters_after"] / result["parameters_before"]}
        cut["tokens"] = (result.get("tokens") or {}).get("after")
        for place, name in ((str(folder), "$WORK"), (str(data_folder()), "$LLMPRUNER_DATA"), (model, Path(model).name)):
            cut["command"] = cut["command"].replace(place, name)
        model = str(output)
    perplexities = evaluated(model, texts=texts)["perplexity"]
    return {**cut, "bits_per_byte": {name: each["bits_per_byte"] for name, each in perplexities.items()}}


def measured_texts(size: int) -> dict[str, str]:
    data = data_folder()
    texts = {
        "WikiText-2": "\n\n".join(fields(data / "wikitext2_raw_test.jsonl", "page")),
        "instructions": instructions(data),
        "Python": "\n\n".join(sources(Path(next(iter(find_spec("jinja2").submodule_search_locations))))),
        "roleplay": "\n\n".join(fields(data / "gpteacher_roleplay_en.jsonl", "output")),
        "Chinese": "\n\n".join(fields(data / "alpaca_gpt4_zh_1k.jsonl", "output")),
    }
    return {name: text.encode()[:size].decode(errors="ignore") for name, text in texts.items()}


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
    """Bits per byte, in parentheses in proportion to those of the dense model."""
    names = list(next(iter(results.values()))["dense"]["bits_per_byte"])
    lines = [f"| model | | tokens | parameters gone | {' | '.join(names)} |", "|---" * (4 + len(names)) + "|"]
    for model, rows in results.items():
        dense = rows["dense"]["bits_per_byte"]
        for row in options_of(model):
            if (values := rows.get(row)) is None:
                continue
            gone = f"{values['gone']:.1%}" if "gone" in values else ""
            bits = values["bits_per_byte"]
            cells = [f"{bits[n]:.3f} ({bits[n] / dense[n]:.3f})" if gone else f"{bits[n]:.3f}" for n in names]
            lines.append(f"| {model} | {row} | {values.get('tokens') or 'all'} | {gone} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
