"""What each step of the closed-form repair is worth on text that no stage has seen.

    LLMPRUNER_DATA=… python -m benchmarks.ablation [--only TEXT …] [--samples 48] [--tokens 8192] [--render]

The demo model loses 20 % of its decoder (``--method best``, units chosen by ``energy`` unless the variant says
otherwise), calibrated on the first 200 documents of the C4 sample and on as much text that it wrote itself, or on the
latter alone, read from files (in windows that begin anywhere) or as the source ``self`` gives it. It is judged on the
other 100 documents, on answers (`alpaca_en_1k`, the second half), and on the same with their instructions in the
model's chat format. These texts are for choosing alone: no benchmark reports them. A row is one variant; rows are
appended to ``results/ablation.jsonl``, so an interrupted run goes on where it stopped, and drawn in
``docs/quality-notes.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from .measure import data_folder, machine

RESULTS = Path(__file__).parent / "results" / "ablation.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "quality-notes.md"
WINDOW = 512
LENGTH = 512
CALIBRATION_DOCUMENTS = 200
TEXTS = ("C4", "instructions", "chats")
"""Those of `judged`."""


@dataclass(frozen=True)
class Variant:
    """``against``: the variant that it changes in one thing. ``settings``: of ``refit``. ``calibration``: of the files
    of `sources`; ``own``: settings of the source ``self``; ``options``: of the prune."""

    name: str
    against: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    calibration: str = "{c4},{written}"
    own: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


_BASE, _IN_TURN, _WRITTEN, _FROM_BOS, _OWN = (
    "a token in eight held out",
    "sources held out in turn",
    "text that the model wrote alone",
    "self, every sample from BOS",
    "self, samples begin as texts do",
)
_BY_SOURCE = {"held_out": "sources"}
_FREE, _FISHER = "widths that differ between layers", "units chosen by fisher"
VARIANTS = (
    Variant(_BASE),
    Variant("without compensation", _BASE, options={"compensate": "none"}),
    Variant(_IN_TURN, _BASE, _BY_SOURCE),
    Variant(_WRITTEN, _BASE, calibration="{written}"),
    Variant("C4 alone", _BASE, calibration="{c4}"),
    Variant("three quarters C4", _BASE, calibration="3*{c4},1*{written}"),
    Variant("o_proj fitted too", _BASE, {"also": "attention"}),
    Variant("token weights", _BASE, {"token_weights": "divergence"}),
    Variant("target chosen by held-out tokens", _BASE, {"target": "held-out"}),
    Variant("mix = 1", _BASE, {"mix": 1.0}),
    Variant("mix = 0.25", _BASE, {"mix": 0.25}),
    Variant(_FREE, _BASE, options={"shape": "free"}),
    Variant(_FISHER, _BASE, options={"importance": "fisher"}),
    Variant(f"{_FREE}, {_FISHER}", _FREE, options={"shape": "free", "importance": "fisher"}),
    Variant(
        "fisher, one ranking of all layers", f"{_FREE}, {_FISHER}",
        options={"shape": "free", "importance": "fisher", "allocation": "global"},
    ),
    Variant("units chosen by fisher and energy", _FISHER, options={"importance": "fisher-and-energy"}),
    Variant("fisher of what other channels do not predict", _FISHER, options={"importance": "fisher-of-the-rest"}),
    Variant("fisher of all removed channels together", _FISHER, options={"importance": "fisher-together"}),
    Variant("units chosen by obs", _BASE, options={"importance": "obs"}),
    Variant(
        "fisher, without compensation", "without compensation",
        options={"importance": "fisher", "compensate": "none"},
    ),
    Variant("sources held out in turn, o_proj fitted too", _IN_TURN, {**_BY_SOURCE, "also": "attention"}),
    Variant("sources held out in turn, token weights", _IN_TURN, {**_BY_SOURCE, "token_weights": "divergence"}),
    Variant(
        "text that the model wrote, an eighth of the samples random tokens", _WRITTEN,
        calibration="7*{written},1*vocabulary",
    ),
    Variant(_FROM_BOS, calibration="self", own={"starts": "bos"}),
    Variant(_OWN, _FROM_BOS, calibration="self"),
    Variant("self, a sample in eight is a conversation", _OWN, calibration="self", own={"chats": 0.125}),
    Variant("self, a sample in four is a conversation", _OWN, calibration="self", own={"chats": 0.25}),
)  # fmt: skip

_WITHOUT = {variant.name for variant in VARIANTS if variant.options.get("compensate") == "none"}
_AGAINST = {variant.name: variant.against for variant in VARIANTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[""], help="measure only variants whose name holds one of these")
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
            chosen = any(text in variant.name for text in arguments.only)
            if chosen and (variant.name, samples, arguments.tokens) not in done:
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

    from . import fisher_variants, vocabulary

    host = plugin_manager()
    for plugin in (vocabulary, fisher_variants):
        host.manager.register(plugin)
    catalog = Catalog(host)
    components = {"refit": dict(variant.settings), "self": dict(variant.own)}
    settings = {
        "ratio": 0.2, "method": "best", "importance": "energy",
        "calibration": calibration, "samples": samples, "length": LENGTH,
        **variant.options,
        "settings": {name: given for name, given in components.items() if given},
    }  # fmt: skip
    job = prune_job(settings_from(PruneSettings, settings), catalog)
    model = api.load("demo", dtype="float32", catalog=catalog)
    return pipeline.apply_draft(model, pipeline.draft_plan(model, job), catalog)


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
    from llmpruner.calibration.written import self_generated

    model = api.load("demo", dtype="float32")
    ids = self_generated(model.model, model.tokenizer, passages, LENGTH, 0)
    assert model.tokenizer is not None
    return [model.tokenizer.decode(row, skip_special_tokens=True) for row in ids]


def changes(found: list[dict[str, Any]], row: Mapping[str, Any]) -> dict[str, float]:
    """Text → the change of KL, in nats per token, from the variant that ``row`` differs from in one thing."""
    base = _same_amount(found, row, _AGAINST.get(row["variant"], ""))
    texts = row["texts"]
    return {name: texts[name]["kl"] - base[name]["kl"] for name in TEXTS if name in texts and name in base}


def no_gain(found: list[dict[str, Any]]) -> list[str]:
    """A line for each variant that raised the sum of the KL of the texts, worst last."""
    measured = [(row["variant"], changes(found, row)) for row in found if row["variant"] not in _WITHOUT]
    worse = [(name, of) for name, of in measured if of and sum(of.values()) > 0]
    lines = []
    for name, of in sorted(worse, key=lambda one: sum(one[1].values())):
        changed = ", ".join(f"{change:+.3f} ({text})" for text, change in of.items())
        lines.append(f"- {name} (instead of: {_AGAINST[name]}): KL {changed}")
    return lines


def _same_amount(found: list[dict[str, Any]], row: Mapping[str, Any], against: str) -> Mapping[str, Any]:
    """The texts of the variant ``against``, with as many samples and tokens as ``row``."""
    key = against, row["samples"], row["tokens"]
    texts = (other["texts"] for other in found if (other["variant"], other["samples"], other["tokens"]) == key)
    return next(texts, {})


def page(found: list[dict[str, Any]]) -> str:
    """``docs/quality-notes.md``"""
    lines = [
        "# Variants of the compensation, measured",
        "",
        "<!-- Written by benchmarks/ablation.py; do not edit. -->",
        "",
        "SmolLM2-135M-Instruct, 20 % of the decoder, `--method best`, uniform widths, units chosen by `energy` unless "
        "the row says otherwise, no training. Calibrated on 200 documents of C4 and as much text that the model wrote, "
        "or on what the row says; judged on 100 other documents of C4, on answers to instructions, and on the same "
        "with their instructions in the model's chat format, in "
        f"windows of {WINDOW}, float32 weights, bfloat16 products. No benchmark reports these texts. KL: mean "
        "divergence from the dense model per token, in nats. Few calibration tokens, so that a row takes minutes: "
        "differences between rows count, not their level. The settings are those of "
        "[`refit`](reference/criteria.md#compensations).",
        "",
        "*Against*: the change of KL from the variant that differs in this one thing, negative where it helps.",
        "",
        "| variant | calibration tokens | against | C4 | instructions | chats | KL, C4 | perplexity | "
        "KL, instructions | perplexity | KL, chats | perplexity | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = {variant.name: place for place, variant in enumerate(VARIANTS)}
    for row in sorted(found, key=lambda row: (order.get(row["variant"], -1), row["samples"])):
        texts, change = row["texts"], changes(found, row)
        changed = [f"{change[name]:+.4f}" if name in change else "" for name in TEXTS]
        cells = [
            f"{texts[name][of]:.{digits}f}" if name in texts else ""
            for name in TEXTS
            for of, digits in (("kl", 4), ("perplexity", 2))
        ]
        if not row["samples"]:
            cells[::2] = ["", "", ""]
        tokens = f"{row['samples'] * LENGTH:,}" if row["samples"] else ""
        named = _AGAINST[row["variant"]] if change else ""
        cells = [row["variant"], tokens, named, *changed, *cells, f"{row['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    if not found:
        return "\n".join([*lines, "", "Nothing was measured yet."]) + "\n"
    machines = dict.fromkeys(f"{row['machine']['cpu']}, {row['machine']['cores']} cores" for row in found)
    lines += ["", f"Machine: {'; '.join(machines)}, which had other work. Seconds: loading and pruning."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
