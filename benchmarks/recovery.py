"""What minutes of recovery bring: a model without a fifth of its decoder, trained for 15, 60 and 180 minutes.

    LLMPRUNER_DATA=… LLMPRUNER_MODELS=… python -m benchmarks.recovery FOLDER [--model NAME] [--text NAME]
        [--minutes 0 15 60 180]
    python -m benchmarks.recovery --render

Each row is one `llmpruner recover --minutes` of the same start (0 minutes), on text that the dense model writes or on
documents of C4 and instructions, none of them judged, of all weights or of LoRA adapters; then the divergence from the
dense model on the texts of `benchmarks.quality`, and answers to 40 instructions. Needs an idle machine. FOLDER keeps
the models, the start is that of `benchmarks.tasks`, and ``results/recovery.jsonl`` the rows, so that an interrupted run
goes on where it stopped. The table is written into ``docs/how-to/recover.md``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from .measure import as_json, data_folder, machine, write_table
from .quality import COLUMNS, MODELS, ROOT, measured_on, version
from .tasks import ADAPTERS, CORPUS, made, recovered

RESULTS = ROOT / "benchmarks" / "results" / "recovery.jsonl"
PAGE = ROOT / "docs" / "how-to" / "recover.md"
WRITTEN = "self-written"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="keeps the models")
    parser.add_argument("--model", choices=MODELS, default=next(iter(MODELS)))
    parser.add_argument("--text", choices=(CORPUS, ADAPTERS, WRITTEN), default=CORPUS)
    parser.add_argument("--minutes", nargs="*", type=int, default=[0, 15, 60, 180])
    parser.add_argument("--render", action="store_true", help="only write the table")
    options = parser.parse_args()
    for minutes in () if options.render else options.minutes:
        text = options.text if minutes else ""
        if not any((row["model"], row["text"], row["minutes"]) == (options.model, text, minutes) for row in read()):
            work = options.folder / options.model
            work.mkdir(parents=True, exist_ok=True)
            row = measured(options.model, text, minutes, work)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(as_json(row), flush=True)
    write_table(PAGE, "minutes", table(read()))


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def measured(model: str, text: str, minutes: int, work: Path) -> dict[str, Any]:
    path = made(model, "best", work)[0]
    about: dict[str, Any] = {}
    if minutes:
        path, about = recovered(path, text, minutes, work)
    found = measured_on(str(MODELS[model]()), path, data_folder())
    return {
        "model": model, "text": text, "minutes": minutes, "commit": version(), "machine": machine(), **about,
        "kl": {name: found["texts"][name]["kl_per_token"] for name in COLUMNS}, "asked": found["asked"],
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    heads = ["model", "trained on", "minutes", "steps", *COLUMNS.values(), "mean", "repeat", "cut off", "GiB", "commit"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    order = [*MODELS]
    for row in sorted(rows, key=lambda row: (order.index(row["model"]), row["text"], row["minutes"])):
        cells = [row["model"], row["text"] or "the start", str(row["minutes"]), str(row.get("steps", "–"))]
        cells += [f"{row['kl'][name]:.3f}" for name in COLUMNS] + [f"{fmean(row['kl'].values()):.3f}"]
        cells += [f"{row['asked'][name]:.0%}" for name in ("repeat_themselves", "cut_off")]
        cells += [f"{row['peak_mib'] / 1024:.1f}" if row["minutes"] else "–", row["commit"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
