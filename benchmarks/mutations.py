"""Random changes of the files that llmpruner reads, each read by a command in a process of its own, with limits of time
and memory, and an audit hook.

A process that has imported everything forks one child for each input, as the imports would take most of the time. The
hook is in the child: it sees programs that are started, connections, code of the input that is run, and files that are
opened for writing outside of the input's folder.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .tiny_checkpoints import Work

SECONDS = 60
MEMORY = 2 << 30
"""Bytes that a child may take beyond what it has when it begins."""
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "os.startfile")


@dataclass
class Tally:
    """What became of the inputs of one kind."""

    what: str
    command: str
    inputs: int = 0
    refused: int = 0
    taken: int = 0
    limits: int = 0
    tracebacks: int = 0
    violations: int = 0
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Kind:
    """``source``: what is copied; ``file``: in it, what is changed, by ``change``. ``arguments``: of the command that
    reads the copy, from its place and that of the output."""

    what: str
    source: Callable[[Work], Path]
    file: str
    change: Callable[[bytes, random.Random], bytes]
    arguments: Callable[[Work, Path, Path], list[str]]


def header_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bytes of the beginning of a binary file changed, or the file cut short."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(min(len(changed), 1500)) if rng.random() < 0.9 else rng.randrange(8)
        changed[place] = rng.choice((0, 255, rng.randrange(256), changed[place] ^ (1 << rng.randrange(8))))
    return bytes(changed[: rng.randrange(len(changed))] if rng.random() < 0.1 else changed)


_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 10**6, 10**12, 2**63, -(10**18), 1e308, float("nan"), "", "x", "../../etc/passwd", "\ud800",
    [], {}, [[]], {"a": 1}, "9" * 5000, 10**4000, "int8", "0-99999999",
)  # fmt: skip


def json_values(data: bytes, rng: random.Random) -> bytes:
    """Values of a JSON file changed, removed or nested deeply; at times a byte."""
    if rng.random() < 0.15:
        return header_bytes(data, rng)
    value = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        value = _edited(value, rng)
    text = json.dumps(value)
    if rng.random() < 0.05:
        text = text.replace(":", ": " + "[" * 50_000, 1)
    return text.encode()


def _edited(value: Any, rng: random.Random) -> Any:
    """``value`` with one place inside changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: _edited(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        return [*value[:place], _edited(value[place], rng), *value[place + 1 :]]
    return rng.choice(_VALUES)


def text_bytes(data: bytes, rng: random.Random) -> bytes:
    """Lines of a text file doubled, removed or changed."""
    lines = data.split(b"\n")
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(lines))
        lines[place] = rng.choice((
            b"", lines[place] * 2, lines[place][::-1], lines[place] + b": {a: &x [*x]}",
            b"!!python/object/apply:os.system [id]", lines[place].replace(b":", b": [", 1),
            b"rounds: 999999999", b"\xff\xfe",
        ))  # fmt: skip
    return b"\n".join(lines)


L1 = ("--ratio", "0.2", "--importance", "l1")
KINDS = (
    Kind("safetensors header", lambda w: w.dense, "model.safetensors", header_bytes,
         lambda w, m, out: ["prune", str(m), *L1, "-o", str(out)]),
    Kind("safetensors of a pruned model", lambda w: w.pruned, "model.safetensors", header_bytes,
         lambda w, m, out: ["verify", str(m)]),
    Kind("GGUF header", lambda w: w.gguf, "model.gguf", header_bytes,
         lambda w, m, out: ["discover", str(m / "model.gguf")]),
    Kind("config.json", lambda w: w.dense, "config.json", json_values,
         lambda w, m, out: ["prune", str(m), *L1, "-o", str(out)]),
    Kind("config.json of a pruned model", lambda w: w.pruned, "config.json", json_values,
         lambda w, m, out: ["verify", str(m)]),
    Kind("llmpruner.json", lambda w: w.pruned, "llmpruner.json", json_values,
         lambda w, m, out: ["export", str(m), "--to", "stock", "-o", str(out)]),
    Kind("llmpruner.json", lambda w: w.pruned, "llmpruner.json", json_values, lambda w, m, out: ["verify", str(m)]),
    Kind("plan", lambda w: w.plan, "", json_values,
         lambda w, m, out: ["prune", str(w.dense), "--plan", str(m), "-o", str(out)]),
    Kind("recipe", lambda w: w.recipe, "", text_bytes, lambda w, m, out: ["run", str(m), "-o", str(out)]),
    Kind("calibration rows", lambda w: w.data, "", text_bytes,
         lambda w, m, out: ["recover", str(w.dense), "--data", str(m), "--max-steps", "1", "-o", str(out)]),
)  # fmt: skip


def mutate(work: Work, folder: Path, inputs: int, seed: int, kinds: tuple[Kind, ...] = KINDS) -> list[Tally]:
    """``inputs`` of each kind."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    server = context.Process(target=_serve, args=(work, folder, inputs, seed, [k.what for k in kinds], sender))
    server.start()
    sender.close()
    tallies: list[Tally] = receiver.recv()
    server.join()
    return tallies


def _serve(work: Work, folder: Path, inputs: int, seed: int, chosen: list[str], sender: Any) -> None:
    import torch

    import llmpruner.api
    from llmpruner.cli import main

    torch.set_num_threads(1)
    folder.mkdir()
    os.chdir(folder)
    # What is imported late would be written as bytecode, and counted.
    sys.dont_write_bytecode = True
    del llmpruner
    tallies = []
    for kind in (kind for kind in KINDS if kind.what in chosen):
        tally = Tally(kind.what, kind.arguments(work, work.dense, folder)[0])
        rng = random.Random(f"{seed} {kind.what} {tally.command}")
        for _ in range(inputs):
            _one(kind, work, folder, rng, tally, main)
        tallies.append(tally)
        print(json.dumps({key: value for key, value in vars(tally).items() if value}), flush=True)
    sender.send(tallies)


def _one(kind: Kind, work: Work, folder: Path, rng: random.Random, tally: Tally, main: Callable[[], None]) -> None:
    place = Path(tempfile.mkdtemp(dir=folder))
    source = kind.source(work)
    model = place / source.name
    if source.is_dir():
        shutil.copytree(source, model)
    else:
        shutil.copyfile(source, model)
    file = model / kind.file if kind.file else model
    file.write_bytes(kind.change(file.read_bytes(), rng))
    arguments = kind.arguments(work, model, place / "out")
    child = os.fork()
    if not child:
        _child(place, ["llmpruner", *arguments], main)
    _, status = os.waitpid(child, 0)
    tally.inputs += 1
    said = (place / "stderr").read_text(errors="replace")
    seen = (place / "seen").read_text(errors="replace")
    code = os.waitstatus_to_exitcode(status)
    kept = f"{kind.what}, {tally.command}"
    if code < 0 or "MemoryError" in said or "can't allocate memory" in said:
        tally.limits += 1
        tally.lines.append(f"{kept}: ended by {code}: {(said.strip().splitlines() or [''])[-1][:200]}")
    elif "Traceback" in said:
        tally.tracebacks += 1
        tally.lines.append(f"{kept}: {(said.strip().splitlines() or [''])[-1][:300]}")
    elif code:
        tally.refused += 1
    else:
        tally.taken += 1
    if seen:
        tally.violations += 1
        tally.lines.append(f"{kept}: {seen.splitlines()[0][:300]}")
    shutil.rmtree(place, ignore_errors=True)


def _child(place: Path, argv: list[str], main: Callable[[], None]) -> None:
    """Does not return."""
    code = 70
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT), number)
        seen = os.open(place / "seen", os.O_WRONLY | os.O_CREAT)
        os.environ["TMPDIR"], tempfile.tempdir = str(place), str(place)
        os.environ["LLMPRUNER_CACHE"] = str(place / "cache")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        signal.alarm(SECONDS)
        sys.addaudithook(_hook(str(place), seen))
        sys.argv = argv
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _hook(place: str, seen: int) -> Callable[[str, tuple[Any, ...]], None]:
    def note(text: str) -> None:
        os.write(seen, (text.encode("utf-8", "backslashreplace") + b"\n"))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _STARTS:
            note(f"{event} {arguments[0]!r}")
        elif event == "open" and arguments[0] is not None and not isinstance(arguments[0], int):
            mode, flags = arguments[1], arguments[2]
            writes = (
                any(c in mode for c in "wax+") if isinstance(mode, str) else bool(flags & (os.O_WRONLY | os.O_RDWR))
            )
            path = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100 - resolving would open files
            if writes and not path.startswith((place, "/dev/", "/proc/")):
                note(f"opened for writing: {path}")
        elif event == "exec" and str(getattr(arguments[0], "co_filename", "")).startswith(place):
            note(f"ran {arguments[0].co_filename}")

    return hook
