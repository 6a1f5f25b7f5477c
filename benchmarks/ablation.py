"""What each step of the closed-form repair is worth on text that no stage has seen.

    LLMPRUNER_DATA=… python -m benchmarks.ablation [--only TEXT] [--samples 48] [--tokens 8192] [--render]

The demo model loses 20 % of its decoder (``--method best``), calibrated on the first 200 documents of the C4 sample and
on as much text that it wrote itself, or on the latter alone, read from files (in windows that begin anywhere) or as the
source ``self`` gives it. It is judged on the other 100 documents, on answers (`alpaca_en_1k`, the second
half), and on the same with their instructions in the model's chat format. These texts are for choosing alone: no
benchmark reports them. A row is one variant; rows are appended to ``results/ablation.jsonl``, so an interrupted run
goes on where it stopped, and drawn in ``docs/quality-notes.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from .measure import data_folder, machine

RESULTS = Path(__file__).parent / "results" / "ablation.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "quality-notes.md"
WINDOW = 512
LENGTH = 512
CALIBRATION_DOCUMENTS = 200


@dataclass(frozen=True)
class Variant:
    """``settings``: of ``refit``. ``sides``: whether the two sources are held out in turn; otherwise every eighth token
    is, as with one source. ``calibration``: of the files of `sources`; ``own``: settings of the source ``self``."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    sides: bool = True
    calibration: str = "{c4},{written}"
    own: Mapping[str, Any] = field(default_factory=dict)


VARIANTS = (
    Variant("self, every sample from BOS", calibration="self", own={"starts": "bos"}),
    Variant("self, samples begin as texts do", calibration="self"),
    Variant("self, a sample in eight is a conversation", calibration="self", own={"chats": 0.125}),
    Variant("self, a sample in four is a conversation", calibration="self", own={"chats": 0.25}),
    Variant("text that the model wrote alone", calibration="{written}"),
    Variant(
        "text that the model wrote, an eighth of the samples random tokens",
        sides=False,
        calibration="7*{written},1*vocabulary",
    ),
    Variant("a token in eight held out", sides=False),
    Variant("sources held out in turn"),
    Variant("sources held out in turn, o_proj fitted too", {"also": "attention"}),
    Variant("sources held out in turn, token weights", {"token_weights": "divergence"}),
    Variant("sources held out in turn, target chosen", {"target": "held-out"}),
    Variant("a token in eight held out, o_proj fitted too", {"also": "attention"}, sides=False),
    Variant("a token in eight held out, token weights", {"token_weights": "divergence"}, sides=False),
    Variant("sources held out in turn, o_proj and token weights", {"also": "attention", "token_weights": "divergence"}),
    Variant("sources held out in turn, mix = 1", {"mix": 1.0}),
    Variant("sources held out in turn, mix = 0.25", {"mix": 0.25}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="measure only the variants whose name holds this text")
    parser.add_argument("--samples", type=int, default=48, help=f"calibration samples of {LENGTH} tokens")
    parser.add_argument("--tokens", type=int, default=8192, help="of each text that is judged on")
    parser.add_argument("--work", type=Path, default=Path("/tmp/llmpruner-ablation"), help="keeps what the model wrote")
    parser.add_argument("--render", action="store_true", help="only write the page again")
    arguments = parser.parse_args()
    if not arguments.render:
        arguments.work.mkdir(parents=True, exist_ok=True)
        done = {(row["variant"], row["samples"], row["tokens"]) for row in rows()}
        for variant in (Variant("dense"), *VARIANTS):
            samples = 0 if variant.name == "dense" else arguments.samples
            if arguments.only in variant.name and (variant.name, samples, arguments.tokens) not in done:
                row = measured(variant, samples, arguments.tokens, arguments.work)
                with RESULTS.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")
                print(variant.name, row["texts"], f"{row['seconds']} s", flush=True)
    PAGE.write_text(page(list(rows())), encoding="utf-8")


def rows() -> Iterator[dict[str, Any]]:
    if RESULTS.is_file():
        yield from map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())


def measured(variant: Variant, samples: int, tokens: int, work: Path) -> dict[str, Any]:
    from llmpruner import api
    from llmpruner.evaluation.perplexity import perplexity

    data = data_folder()
    started = time.monotonic()
    if samples:
        model = pruned(variant, samples, variant.calibration.format(**sources(data, work, samples)))
    else:
        model = api.load("demo", dtype="float32")
    took = time.monotonic() - started
    dense = api.load("demo", dtype="float32")
    texts = {}
    for name, text in judged(data).items():
        found = perplexity(
            model.model, dense.tokenizer, text,
            window=WINDOW, tokens=tokens, batch_size=2, autocast=True, reference=dense.model if samples else None,
        )  # fmt: skip
        texts[name] = {"perplexity": found.perplexity, "kl": found.kl_per_token or 0.0}
    return {
        "variant": variant.name,
        "settings": dict(variant.settings),
        "samples": samples,
        "tokens": tokens,
        "texts": texts,
        "seconds": round(took, 1),
        "command": " ".join(["python -m benchmarks.ablation", *sys.argv[1:]]),
        "machine": machine(),
    }


def pruned(variant: Variant, samples: int, calibration: str) -> Any:
    """The model of a variant."""
    from llmpruner import Catalog, api, plugin_manager
    from llmpruner.recipes import pipeline
    from llmpruner.recipes.jobs import prune_job
    from llmpruner.settings import PruneSettings, settings_from

    from . import vocabulary

    host = plugin_manager()
    host.manager.register(vocabulary)
    catalog = Catalog(host)
    settings = {
        "ratio": 0.2, "method": "best", "calibration": calibration, "samples": samples, "length": LENGTH,
        "settings": {"refit": dict(variant.settings), **({"self": dict(variant.own)} if variant.own else {})},
    }  # fmt: skip
    job = prune_job(settings_from(PruneSettings, settings), catalog)
    model = api.load("demo", dtype="float32", catalog=catalog)
    draft = pipeline.draft_plan(model, job)
    assert draft.calibration is not None
    if not variant.sides:
        draft = replace(draft, calibration=replace(draft.calibration, parts=()))
    return pipeline.apply_draft(model, draft, catalog)


def documents(data: Path) -> list[str]:
    lines = (data / "c4_sample_300.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def judged(data: Path) -> dict[str, str]:
    """Text to choose by: neither in the calibration, nor in a benchmark."""
    lines = (data / "alpaca_en_1k.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[len(lines) // 2 :]]
    return {
        "C4": "\n\n".join(documents(data)[CALIBRATION_DOCUMENTS:]),
        "instructions": "\n\n".join(row["output"] for row in rows),
        "chats": "".join(_chat(row) for row in rows),
    }


def _chat(row: Mapping[str, str]) -> str:
    question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    text: str = _tokenizer().apply_chat_template(messages, tokenize=False)
    return text


@cache
def _tokenizer() -> Any:
    from llmpruner import api

    return api.load("demo", dtype="float32").tokenizer


def sources(data: Path, work: Path, samples: int) -> dict[str, Path]:
    """Files of text by name. What the model writes, a little more than all samples, is kept in ``work``."""
    files = {"c4": work / "c4.jsonl", "written": work / f"written-{samples}.jsonl"}
    if not files["c4"].is_file():
        _write(files["c4"], documents(data)[:CALIBRATION_DOCUMENTS])
    if not files["written"].is_file():
        _write(files["written"], _written(samples + 4))
    return files


def _write(file: Path, texts: list[str]) -> None:
    aside = file.with_suffix(".partial")
    aside.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    aside.replace(file)


def _written(passages: int) -> list[str]:
    from llmpruner import api
    from llmpruner.data.written import self_generated

    model = api.load("demo", dtype="float32")
    ids = self_generated(model.model, model.tokenizer, passages, LENGTH, 0)
    assert model.tokenizer is not None
    return [model.tokenizer.decode(row, skip_special_tokens=True) for row in ids]


def page(found: list[dict[str, Any]]) -> str:
    """``docs/quality-notes.md``"""
    lines = [
        "# Variants of the compensation, measured",
        "",
        "<!-- Written by benchmarks/ablation.py; do not edit. -->",
        "",
        "SmolLM2-135M-Instruct, 20 % of the decoder, `--method best`, uniform widths, no training. Calibrated on 200 "
        "documents of C4 and as much text that the model wrote, or on what the row says; judged on 100 other documents "
        "of C4, on answers to instructions, and on the same with their instructions in the model's chat format, in "
        f"windows of {WINDOW}, float32 weights, bfloat16 products. No benchmark reports these texts. KL: mean "
        "divergence from the dense model per token, in nats. Few calibration tokens, so that a row takes minutes: "
        "differences between rows count, not their level. The settings are those of "
        "[`refit`](reference/criteria.md#compensations).",
        "",
        "| variant | calibration tokens | judged on | KL, C4 | perplexity, C4 | KL, instructions | "
        "perplexity, instructions | KL, chats | perplexity, chats | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        texts = row["texts"]
        cells = [
            f"{texts[name][of]:.{digits}f}" if name in texts else ""
            for name in ("C4", "instructions", "chats")
            for of, digits in (("kl", 4), ("perplexity", 2))
        ]
        if not row["samples"]:
            cells[::2] = ["", ""]
        tokens = f"{row['samples'] * LENGTH:,}" if row["samples"] else ""
        judged_on = f"{len(texts)} × {row['tokens']:,}"
        lines.append(f"| {row['variant']} | {tokens} | {judged_on} | {' | '.join(cells)} | {row['seconds']:.0f} |")
    if not found:
        return "\n".join([*lines, "", "Nothing was measured yet."]) + "\n"
    machines = dict.fromkeys(f"{row['machine']['cpu']}, {row['machine']['cores']} cores" for row in found)
    lines += ["", f"Machine: {'; '.join(machines)}, which had other work. Seconds: loading and pruning."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
