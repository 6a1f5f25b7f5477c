"""Running a command in a process of its own and measuring it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any


def run(
    *arguments: str, timeout: int = 3600, module: str = "llmpruner", checkout: Path | None = None
) -> dict[str, Any]:
    """``llmpruner ARGUMENTS``, or those of another ``module``: wall seconds, peak resident MiB, and standard output.
    ``checkout``: the version of the core to run; by default this one. Raises on a non-zero exit, as after ``timeout``
    seconds, when it is killed.

    Import no torch into the process that calls this: Linux counts what a parent holds into its child's peak.
    """
    started = time.monotonic()
    command = [sys.executable, "-m", module, *arguments]
    # Python takes packages from the current folder first.
    with tempfile.TemporaryFile("w+") as messages:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, text=True, cwd=checkout)
        limit = threading.Timer(timeout, process.kill)
        limit.start()
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        limit.cancel()
        if status:
            messages.seek(0)
            raise SystemExit(f"{' '.join(command)} failed with status {status}:\n{messages.read()[-2000:]}")
    return {
        "command": " ".join((module, *arguments)),
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": round(usage.ru_maxrss / 1024),
        "output": output,
    }


def evaluated(*arguments: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """What ``llmpruner evaluate ARGUMENTS`` gives for the last model, in float32; its ``perplexity`` is one for each of
    the ``texts``."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.txt" for name in texts}
        for name, file in files.items():
            file.write_text(texts[name], encoding="utf-8")
        report = Path(folder) / "evaluation.json"
        options = ("--perplexity", ",".join(map(str, files.values())), "--dtype", "float32", "--json", str(report))
        run("evaluate", *arguments, *options, timeout=7200)
        result = json.loads(report.read_text())[-1]
    first = result["perplexity"]
    by_file = {first["text"]: first, **first["others"]}
    return {**result, "perplexity": {name: by_file[str(file)] for name, file in files.items()}}


def data_folder() -> Path:
    root = os.environ.get("LLMPRUNER_DATA")
    if not root:
        raise SystemExit("set LLMPRUNER_DATA to the folder that holds the shared data sets")
    return next(f for f in (Path(root) / "data", Path(root)) if (f / "wikitext2_unk_test.txt").is_file())


def instructions(data: Path) -> str:
    """The answers of an instruction set, as one text."""
    lines = (data / "alpaca_gpt4_en_999.jsonl").read_text(encoding="utf-8").splitlines()
    return "\n\n".join(json.loads(line)["output"] for line in lines)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    packages = ("torch", "transformers", "peft", "lm-eval")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return {"cpu": model, "cores": os.cpu_count(), "versions": {p: version(p) for p in packages}}


def marks(name: str) -> tuple[str, str]:
    """Between which a page has the table of ``name``."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def write_table(page: Path, name: str, table: str) -> None:
    begin, end = marks(name)
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    page.write_text(f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
