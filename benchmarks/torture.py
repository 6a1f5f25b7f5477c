"""Faults under every writing command, and damaged inputs: nothing lost, nothing wrong, no traceback.

    python -m benchmarks.torture [--kills N] [--inputs N] [--cycles N] [--seed N]

Faults: SIGINT, SIGTERM and SIGKILL at random moments, a full disk, a read-only folder, a folder that is removed
meanwhile, two runs at once. Afterwards the same command runs undisturbed, and must end with the bytes of an undisturbed
run. A full and a read-only disk are small file systems in memory, which only root may mount; without, they are left
out, and the table says so. Then random changes of files (`benchmarks.mutations`), and many prunes in one process
(`benchmarks.soak`). Writes ``benchmarks/torture.md``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .mutations import Tally, mutate
from .soak import Use, grown, soak
from .tiny_checkpoints import Work

PAGE = Path(__file__).parent / "torture.md"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
TIMEOUT = 600.0


@dataclass
class Row:
    """One row of the table. ``skipped``: why there are no runs."""

    command: str
    fault: str
    runs: int = 0
    lost: int = 0
    wrong: int = 0
    tracebacks: int = 0
    skipped: str = ""
    lines: list[str] = field(default_factory=list)


def commands(work: Work) -> dict[str, Callable[[Path], list[str]]]:
    """Name → the arguments that write to a path."""
    text = ("--calibration", str(work.text), "--samples", "16", "--length", "48")
    return {
        "plan": lambda out: ["plan", str(work.dense), "--ratio", "0.2", "--importance", "l1", "-o", str(out)],
        "prune": lambda out: ["prune", str(work.dense), "--ratio", "0.2", "--method", "best", *text, "-o", str(out)],
        "recover": lambda out: [
            *("recover", str(work.pruned), "--data", str(work.data), "--max-steps", "4", "--batch-size", "2"),
            *("--validation", "0", "-o", str(out)),
        ],
        "convert": lambda out: ["convert", str(work.meta), "--no-tokenizer", "-o", str(out)],
        "export": lambda out: ["export", str(work.pruned), "--to", "stock", "-o", str(out)],
        "run": lambda out: ["run", str(work.recipe), "-o", str(out)],
        "discover --html": lambda out: ["discover", str(work.dense), "--html", str(out)],
    }


def process(arguments: Sequence[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "llmpruner", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, errors="replace"
    )


def finished(running: subprocess.Popen[str]) -> tuple[int, str]:
    _, error = running.communicate(timeout=TIMEOUT)
    return running.returncode, error


def digest(path: Path) -> str:
    """Of a file, or of the weights in a folder; empty where there is nothing."""
    if not path.exists():
        return ""
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    found = hashlib.sha256()
    for file in files:
        found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()


@dataclass
class Command:
    """A command in an empty folder. ``seconds``, ``expected``: of an undisturbed run."""

    name: str
    arguments: Callable[[Path], list[str]]
    folder: Path
    seconds: float = 0.0
    expected: str = ""

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def undisturbed(self) -> None:
        self.folder.mkdir()
        started = time.monotonic()
        code, error = finished(process(self.arguments(self.out)))
        assert code == 0, error
        self.seconds, self.expected = time.monotonic() - started, digest(self.out)
        self.clear()

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def judge(self, row: Row, error: str, out: Path, *, again: bool = True) -> None:
        """Count what a disturbed run did, and run the command again."""
        row.runs += 1
        if "Traceback" in error:
            row.tracebacks += 1
            row.lines.append(error.strip().splitlines()[-1][:300])
        # A folder of a recipe may be half done; each step is whole or absent.
        if self.name != "run" and digest(out) not in ("", self.expected):
            row.wrong += 1
            row.lines.append(f"{self.name}, {row.fault}: a damaged result was left")
        if again and digest(out) != self.expected:
            code, said = finished(process(self.arguments(out)))
            row.lost += code != 0
            row.wrong += code == 0 and digest(out) != self.expected
            row.tracebacks += "Traceback" in said
            if code:
                row.lines.append(f"{self.name}, {row.fault}, again: {said.strip().splitlines()[-1][:300]}")
        left = [path.name for path in out.parent.iterdir() if path.name.endswith(".partial")] if again else []
        if left:
            row.wrong += 1
            row.lines.append(f"{self.name}, {row.fault}: {left[0]} was left behind")


def kill(command: Command, number: signal.Signals, runs: int, rng: random.Random) -> Row:
    row = Row(command.name, number.name)
    for _ in range(runs):
        running = process(command.arguments(command.out))
        error = ""
        try:
            running.wait(rng.uniform(0.05, 0.98) * command.seconds)
        except subprocess.TimeoutExpired:
            running.send_signal(number)
        _, error = finished(running)
        command.judge(row, error, command.out)
        command.clear()
    return row


def two_at_once(command: Command) -> Row:
    """One of them must give the result; the other gives it too, or is refused in a line."""
    row = Row(command.name, "two at once")
    both = [process(command.arguments(command.out)) for _ in range(2)]
    ended = [finished(one) for one in both]
    row.lost += all(code != 0 for code, _ in ended)
    command.judge(row, "\n".join(error for _, error in ended), command.out)
    command.clear()
    return row


def removed(command: Command, rng: random.Random) -> Row:
    """The folder of the output is removed while the command runs."""
    row = Row(command.name, "target removed")
    running = process(command.arguments(command.out))
    try:
        running.wait(rng.uniform(0.3, 0.9) * command.seconds)
    except subprocess.TimeoutExpired:
        shutil.rmtree(command.folder, ignore_errors=True)
    _, error = finished(running)
    command.folder.mkdir(exist_ok=True)
    command.judge(row, error, command.out)
    command.clear()
    return row


@contextmanager
def file_system(options: str) -> Iterator[Path | None]:
    """A file system in memory; None where this user may not mount one."""
    with tempfile.TemporaryDirectory() as place:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, check=False
        ).returncode
        try:
            yield None if mounted else Path(place)
        finally:
            if not mounted:
                subprocess.run(["umount", "-l", place], check=False)


def on_disk(command: Command, fault: str, options: str) -> Row:
    """A run whose output is in a file system that takes nothing, or too little; then one that has room."""
    row = Row(command.name, fault)
    with file_system(options) as place:
        if place is None:
            row.skipped = "only root mounts file systems"
            return row
        out = place / "out"
        code, error = finished(process(command.arguments(out)))
        if code == 0 and digest(out) != command.expected:
            row.wrong += 1
        subprocess.run(["mount", "-o", "remount,rw,size=512m", str(place)], check=True, capture_output=True)
        command.judge(row, error, out)
    return row


def faults(work: Work, folder: Path, kills: int, rng: random.Random, names: Sequence[str] = ()) -> Iterator[Row]:
    for name, arguments in commands(work).items():
        if names and name not in names:
            continue
        command = Command(name, arguments, folder / name.replace(" ", ""))
        command.undisturbed()
        for number in SIGNALS:
            yield kill(command, number, kills, rng)
        yield two_at_once(command)
        yield removed(command, rng)
        for size in ("16k", "128k"):
            yield on_disk(command, f"disk of {size}", f"size={size}")
        yield on_disk(command, "read-only", "ro")


def page(rows: Sequence[Row], tallies: Sequence[Tally], uses: Sequence[Use], seconds: float, options: str) -> str:
    lines = [
        "# Faults",
        "",
        f"`python -m benchmarks.torture {options}`, {seconds / 60:.0f} minutes. *Lost*: the same command did not go "
        "on to a result afterwards. *Wrong*: a result that is not that of an undisturbed run, or something left "
        "behind.",
        "",
        "| command | fault | runs | lost | wrong | tracebacks |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        counts = f"{row.runs} | {row.lost} | {row.wrong} | {row.tracebacks}"
        lines.append(f"| {row.command} | {row.fault} | {(row.skipped and f'none: {row.skipped} | | |') or counts} |")
    lines += [
        "",
        "## Damaged inputs",
        "",
        "Random changes of files. *Refused*: a line and exit code 1 or 2; *taken*: the command went on, as with a "
        "change that means nothing. *Executed or written*: an audit hook saw a program started, code of the input "
        "run, a connection, or a file written outside of the output.",
        "",
        "| input | command | inputs | refused | taken | too long or too large | tracebacks | executed or written |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for t in tallies:
        cells = (t.what, t.command, t.inputs, t.refused, t.taken, t.limits, t.tracebacks, t.violations)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "",
        "## Cycles",
        "",
        "A tiny model pruned, saved, loaded and asked for a few tokens, again and again in one process.",
        "",
        "| cycles | resident MiB | open files | threads | objects |",
        "|---|---|---|---|---|",
        *(f"| {u.cycles} | {u.mib:.0f} | {u.files} | {u.threads} | {u.objects} |" for u in uses),
    ]
    found = [line for row in rows for line in row.lines] + [line for tally in tallies for line in tally.lines]
    found += [line for line in [grown(uses)] if line]
    if found:
        lines += ["", "## What was seen", "", *(f"- `{line}`" for line in found)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=2, help="of each signal and command")
    parser.add_argument("--inputs", type=int, default=60, help="of each kind of file")
    parser.add_argument("--cycles", type=int, default=200, help="of prune, save, load and generate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", default="", help="only these, with commas between them")
    parser.add_argument("--output", type=Path, default=PAGE)
    given = parser.parse_args()
    started, rng = time.monotonic(), random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "benchmarks.tiny_checkpoints", folder], check=True)
        work = Work(Path(folder))
        (Path(folder) / "runs").mkdir()
        names = [name for name in given.commands.split(",") if name]
        rows = []
        for row in faults(work, Path(folder) / "runs", given.kills, rng, names):
            rows.append(row)
            print(json.dumps({key: value for key, value in vars(row).items() if value}), flush=True)
        tallies = mutate(work, Path(folder) / "mutated", given.inputs, given.seed)
        uses = soak(work, given.cycles)
        options = f"--kills {given.kills} --inputs {given.inputs} --cycles {given.cycles} --seed {given.seed}"
        text = page(rows, tallies, uses, time.monotonic() - started, options)
    given.output.write_text(text.replace(folder, "$WORK"), encoding="utf-8")
    bad = sum(r.lost + r.wrong + r.tracebacks for r in rows) + sum(
        t.limits + t.tracebacks + t.violations for t in tallies
    )
    bad += bool(grown(uses))
    sys.exit(f"{bad} faults; see {given.output}" if bad else 0)


if __name__ == "__main__":
    main()
