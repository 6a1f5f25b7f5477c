"""How long mistakes take, and what they say: the seconds until `llmpruner` refuses a command, and its line.

    LLMPRUNER_MODELS=… python -m benchmarks.mistakes

Writes ``results/mistakes.md``: the median of three runs each, on a GGUF file of 0.5B parameters. Needs an idle machine.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from . import real_models
from .measure import machine

RESULTS = Path(__file__).parent / "results" / "mistakes.md"
RUNS = 3


def main() -> None:
    model = str(real_models.gguf("qwen-0.5b"))
    with tempfile.TemporaryDirectory() as work:
        place = Path(work)
        (place / "empty.txt").write_text("\n")
        (place / "half.gguf").write_bytes(Path(model).read_bytes()[: Path(model).stat().st_size // 2])
        (place / "models" / "small").mkdir(parents=True)
        fifth, out = ("--ratio", "0.2"), ("-o", f"{work}/out")
        commands: list[tuple[str, ...]] = [
            ("prune", model, *fifth, "--device", "cuda", *out),
            ("prune", model, *fifth, "--calibration", f"{work}/empty.txt", *out),
            ("evaluate", model, "--perplexity", f"{work}/empty.txt"),
            ("prune", f"{work}/half.gguf", *fifth, *out),
            ("prune", model, *fifth, "--kinds", "vocab", *out),
            ("prune", model, "--ratio", "20%", *out),
            ("prune", model, "--ratio", "0,2", *out),
            ("evaluate", model, "--metrics", "kl"),
            ("export", model, "--to", "gguf", "--set", "gguf.quant=Q4_K", *out),
            ("prune", model, *fifth, "-o", f"{work}/models"),
            ("quantize", model, *out),
            ("prune", model, *fifth, "--quantize", *out),
        ]
        rows = ["| command | seconds | line |", "|---|---|---|"]
        for command in commands:
            done = [refused(command) for _ in range(RUNS)]
            shown = [text.replace(model, "MODEL").replace(work, "DIR") for text in (" ".join(command), done[0][1])]
            rows.append(f"| `{shown[0]}` | {median(seconds for seconds, _ in done):.1f} | {shown[1]} |")
            print(rows[-1], flush=True)
    facts = machine()
    rows += ["", f"{facts['cpu']}, {facts['cores']} cores; `python -m benchmarks.mistakes`."]
    RESULTS.write_text("\n".join(rows) + "\n", encoding="utf-8")


def refused(command: tuple[str, ...]) -> tuple[float, str]:
    """Seconds, and what was said, without the word that begins it. Raises on a traceback, and where all went well."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "llmpruner", *command], capture_output=True, text=True, check=False)
    seconds = time.monotonic() - began
    said = done.stderr.strip().splitlines()[-1]
    if done.returncode != 2 or not said.startswith("error: "):
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")
    return seconds, said.removeprefix("error: ")


if __name__ == "__main__":
    main()
