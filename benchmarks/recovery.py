"""Recovery strategies on pruned models, judged on texts of which no stage saw any.

    LLMPRUNER_DATA=… python -m benchmarks.recovery [--work FOLDER] [--render] [NAME …]

``NAME``: of `WAYS`; the others keep their results. Each has the same time, 15 minutes, on the demo model with 20 % of
its decoder removed without a corpus. Two have 30 minutes, on the model with 40 % removed, calibrated on WikiText-2's
validation part; and the paper's own way, its method of pruning and two epochs of LoRA, has no limit. The number of
steps is what fits into the time (``--minutes``); all examples are trained on (``--validation 0``). ``--work``: where
the pruned models are kept, for later runs. Writes ``results/recovery.json`` and ``docs/recovery-measured.md``;
``--render`` only the page.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

from .measure import as_json, data_folder, instructions, machine, measured, run

RESULTS = Path(__file__).parent / "results" / "recovery.json"
PAGE = Path(__file__).parents[1] / "docs" / "recovery-measured.md"
BY_LAYER = {"local": 30}
"""The layers of the demo model, for ways that train them one by one: steps are counted over all of them, and fit into
the time by the seconds of the first of each layer."""
PROBE = 4
"""These steps."""
CUTOFF, BATCH = 256, 2
"""Tokens of an example where the command does not say; and the batch that rows of before it was recorded had."""
PRUNED = {
    "pruned": ("--ratio", "0.2"),
    "pruned, a conversation in eight": ("--ratio", "0.2", "--set", "self.chats=0.125"),
    "pruned, all samples from BOS": ("--ratio", "0.2", "--set", "self.starts=bos"),
    "pruned by 40 %": ("--ratio", "0.4", "--calibration", "{wikitext}"),
    "pruned as in the paper": ("--ratio", "0.2", "--method", "llm-pruner", "--calibration", "{wikitext}"),
}
"""The models to start from: the options of ``llmpruner prune demo``."""


@dataclass(frozen=True)
class Way:
    """Options of ``llmpruner recover``, for a model of `PRUNED`. ``minutes``: None where the options say how long it
    trains."""

    options: tuple[str, ...]
    minutes: int | None = 15
    pruned: str = "pruned"


_PAPER = ("--strategy", "lora", "--data", "{alpaca}", "--autocast", "--batch-size", "64")
_PACKED = ("--pack", "--learning-rate", "2e-4", "--autocast")
_MIXED = ("--data", "{c4},{alpaca}", *_PACKED)
_DISTIL = ("--strategy", "distil", *_MIXED)
_WITH_LABELS = ("--set", "distil.labels=0.5", *_DISTIL)
_FROM_CHATS = {"distil": _DISTIL, "distil and next tokens": _WITH_LABELS}
"""Ways that were measured from a model one in eight of whose calibration samples was a conversation."""
_FROM_BOS = {
    "distil": _DISTIL,
    "full": ("--strategy", "full", *_MIXED),
    "distil, self-written": ("--strategy", "distil", "--data", "self:2000", *_PACKED),
    "lora, the paper's": _PAPER,
}
"""Ways that were measured from a model whose calibration text began as in version 0.1, with BOS in every sample."""
WAYS = {
    "distil": Way(_DISTIL),
    "distil and next tokens": Way(_WITH_LABELS),
    "full": Way(("--strategy", "full", *_MIXED)),
    "local": Way(("--strategy", "local", *_MIXED, "--cutoff", "512", "--batch-size", "8")),
    "distil, self-written": Way(("--strategy", "distil", "--data", "self:2000", *_PACKED)),
    "lora, self-written": Way(("--strategy", "lora", "--data", "self:2000", "--autocast")),
    "lora, the paper's": Way(_PAPER),
    "the paper's prune and two epochs": Way(_PAPER, minutes=None, pruned="pruned as in the paper"),
    **{
        f"{name}, a conversation in eight": Way(options, pruned="pruned, a conversation in eight")
        for name, options in _FROM_CHATS.items()
    },
    **{f"{name}, from BOS": Way(options, pruned="pruned, all samples from BOS") for name, options in _FROM_BOS.items()},
    "distil, 40 % removed": Way(_DISTIL, minutes=30, pruned="pruned by 40 %"),
    "distil and next tokens, 40 % removed": Way(_WITH_LABELS, minutes=30, pruned="pruned by 40 %"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder in which the pruned models are kept")
    parser.add_argument("--render", action="store_true", help="only write the page again")
    parser.add_argument("names", nargs="*", default=list(WAYS))
    arguments = parser.parse_args()
    done: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if arguments.render:
        PAGE.write_text(page(done), encoding="utf-8")
        return
    data = data_folder()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        kept = (arguments.work or work).resolve()

        def keep() -> None:
            text = as_json(done).replace(str(kept), "$WORK").replace(str(work), "$WORK")
            text = text.replace(str(data), "$LLMPRUNER_DATA")
            RESULTS.write_text(text)
            PAGE.write_text(page(json.loads(text)), encoding="utf-8")

        if "chats" not in done.get("dense", {}):
            done["dense"] = judged("demo", data, work)
        for name in arguments.names:
            way = WAYS[name]
            pruned = kept / way.pruned.replace(" ", "-").replace("%", "percent")
            if not pruned.is_dir():
                found = run("prune", "demo", *with_data(PRUNED[way.pruned], data), "-o", str(pruned))
                done[way.pruned] = {key: found[key] for key in ("command", "seconds", "peak_mib")}
            if "chats" not in done.setdefault(way.pruned, {}):
                done[way.pruned] |= judged(str(pruned), data, work)
                keep()
            done[name] = {"machine": machine(), "minutes": way.minutes, **recovered(name, way, pruned, data, work)}
            keep()


def with_data(options: tuple[str, ...], data: Path) -> tuple[str, ...]:
    names = {
        "c4": data / "c4_sample_300.jsonl",
        "alpaca": data / "alpaca_en_1k.jsonl",
        "wikitext": data / "wikitext2_unk_validation.jsonl",
    }
    return tuple(option.format(**names) for option in options)


def recovered(name: str, way: Way, pruned: Path, data: Path, work: Path) -> dict[str, Any]:
    options = with_data(way.options, data)
    if name in BY_LAYER and way.minutes:
        steps = steps_of_layers(BY_LAYER[name], options, pruned, way.minutes, work)
        options = (*options, "--max-steps", str(steps))
    elif way.minutes:
        options = (*options, "--minutes", str(way.minutes), "--validation", "0")
    out = work / "recovered"
    found = run("recover", str(pruned), *options, "-o", str(out), timeout=36000)
    record = json.loads((out / "llmpruner.json").read_text())["recovery"][-1]
    judgement = judged(str(out), data, work)
    shutil.rmtree(out)
    losses = record["losses"]
    return {
        **{key: found[key] for key in ("command", "seconds", "cpu_seconds", "peak_mib")},
        "steps": len(losses), "batch_size": record["settings"]["batch_size"],
        "first and last loss": [losses[0], losses[-1]], **judgement,
    }  # fmt: skip


def steps_of_layers(layers: int, options: tuple[str, ...], pruned: Path, minutes: float, work: Path) -> int:
    """The steps over all layers that fit into the time."""
    probes = layers, layers * (1 + PROBE)
    # What is before the first step is in both.
    short, long = (
        run("recover", str(pruned), *options, "--max-steps", str(steps), "-o", str(work / f"probe-{steps}"))["seconds"]
        for steps in probes
    )
    for steps in probes:
        shutil.rmtree(work / f"probe-{steps}")
    return layers * max(1, int((60 * minutes - short) / ((long - short) / PROBE)))


def judged(model: str, data: Path, work: Path) -> dict[str, float]:
    text = work / "instructions.txt"
    text.write_text(instructions(data), encoding="utf-8")
    first = measured(model, data / "wikitext2_unk_test.txt", work)
    second = measured(model, text, work, kl=False)
    chats = work / "chats.txt"
    chats.write_text(_chats(data), encoding="utf-8")
    third = measured(model, chats, work)
    return {
        "wikitext2": first["perplexity"], "kl": first["kl_per_token"], "instructions": second["perplexity"],
        "chats": third["perplexity"], "kl of chats": third["kl_per_token"],
    }  # fmt: skip


def _chats(data: Path) -> str:
    """The instructions of `measure.instructions` with their answers, in the demo model's chat format, which its
    tokenizer reads as special tokens."""
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    rows = map(json.loads, (data / "alpaca_gpt4_en_999.jsonl").read_text(encoding="utf-8").splitlines())
    chats = [
        {
            "system": system,
            "user": "\n".join(filter(None, (row["instruction"], row.get("input")))),
            "assistant": row["output"],
        }
        for row in rows
    ]
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for chat in chats for role, text in chat.items())


def page(done: dict[str, Any]) -> str:
    """``docs/recovery-measured.md``"""
    lines = [
        "# Recovery, measured",
        "",
        "<!-- Written by benchmarks/recovery.py; do not edit. -->",
        "",
        "SmolLM2-135M-Instruct after 20 % of its decoder was removed by the default method, on text that it generated; "
        "in the rows that say so, 40 %, calibrated on WikiText-2's validation part. Perplexity on 20,480 tokens of "
        "WikiText-2 test, of answers to instructions, and of chats (the same answers with their instructions, in the "
        "model's chat format), in windows of 512; neither the cut nor the training read these texts. "
        "*Recovered*: of the loss that the cut added, in nats per token, the share that the training removed. KL: mean "
        "divergence from the dense model per token of WikiText-2, or of chats, in nats. Tokens: at most so many, as "
        "examples that are not packed may be shorter.",
        "",
        "`full` and `lora` are trained on the next tokens of their data, so that perplexity falls on text like it, and "
        "the divergence may rise; the targets of `distil` and `local` are the dense model's outputs.",
        "",
        "| | minutes | steps × examples | tokens | WikiText-2 | recovered | instructions | recovered | KL "
        "| chats | KL, chats | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        _row("dense", done["dense"]),
    ]
    for start in PRUNED:
        ways = [name for name, way in WAYS.items() if way.pruned == start and name in done]
        if not ways:
            continue
        lines.append(_row(start, done[start]))
        for name in sorted(ways, key=lambda name: float(done[name]["wikitext2"])):
            found = done[name]
            # Every layer is trained on the same tokens.
            steps = found["steps"] // BY_LAYER.get(name, 1)
            trained = f"{steps} × {batch_of(found)}"
            tokens = f"{steps * batch_of(found) * _option(found, '--cutoff', CUTOFF):,}"
            lines.append(_row(name, found, trained, tokens, before=done[start], dense=done["dense"]))
    machines = sorted({f"{one['cpu']}, {one['cores']} cores" for way in done.values() if (one := way.get("machine"))})
    commands = [f"- {name}: `{done[name]['command']}`" for name in WAYS if name in done]
    return "\n".join([*lines, "", f"Machine: {'; '.join(machines)}. Commands:", "", *commands, ""])


def _row(
    name: str,
    found: dict[str, Any],
    trained: str = "",
    tokens: str = "",
    *,
    before: dict[str, Any] | None = None,
    dense: dict[str, Any] | None = None,
) -> str:
    cells = [name, str(found.get("minutes") or ""), trained, tokens]
    for text in ("wikitext2", "instructions"):
        share = ""
        if before is not None and dense is not None:
            share = f"{log(before[text] / found[text]) / log(before[text] / dense[text]):.0%}"
        cells += [f"{found[text]:.2f}", share]
    chats = (f"{found['chats']:.2f}", f"{found['kl of chats']:.3f}") if "chats" in found else ("", "")
    cells += [f"{found['kl']:.3f}", *chats, str(found.get("peak_mib", "") if trained else "")]
    return f"| {' | '.join(cells)} |"


def batch_of(found: dict[str, Any]) -> int:
    """Examples in a step."""
    return int(found.get("batch_size") or _option(found, "--batch-size", BATCH))


def _option(found: dict[str, Any], name: str, default: int) -> int:
    words = found["command"].split()
    return int(words[words.index(name) + 1]) if name in words else default


if __name__ == "__main__":
    main()
