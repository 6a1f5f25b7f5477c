"""Reading a chapter as its reader does: files are written down as they are quoted, and commands are typed."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from pathlib import Path

from fresh import run_fresh

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial"

_BLOCK = re.compile(
    r"(?:^<!-- (?P<quote>file|part): (?P<path>\S+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.S | re.M
)
_PROGRAMS = ("llmpruner", "python", "pytest")
_PROGRAM = """
import importlib.metadata, json, os, runpy, sys
environment, joined, tests, name, *arguments = json.loads(sys.argv[1])
if joined:
    os.dup2(1, 2)
os.environ.clear()
os.environ.update(environment)
sys.path[:1] = [environment["PIP_TARGET"]]
if name == "pytest":
    # The processes that tests of a package start are forked, too.
    sys.path.append(tests)
    import fresh
    sys.path.remove(tests)
    from llmpruner.testing import family
    family.run_python = fresh.run_fresh
if name != "python":
    sys.argv = [name, *arguments]
    script = next(iter(importlib.metadata.entry_points(group="console_scripts", name=name)))
    sys.exit(script.load()())
elif arguments[0] == "-c":
    sys.argv = ["-c", *arguments[2:]]
    sys.path.insert(0, "")
    exec(arguments[1], {"__name__": "__main__"})
else:
    sys.argv = arguments
    sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
    runpy.run_path(arguments[0], run_name="__main__")
"""
"""Runs one of `_PROGRAMS` as the shell would. ``joined``: its standard error goes to its standard output."""
_COMMAND = re.compile(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block. ``quote``: *file* (the whole file ``path``), *part* (some lines of it), or None."""

    line: int
    language: str
    text: str
    quote: str | None
    path: str | None


def blocks(chapter: str) -> Iterator[Block]:
    text = (TUTORIAL / chapter).read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("language")) + 1
        yield Block(line, found["language"], found["text"], found["quote"], found["path"])


def commands(block: Block) -> list[tuple[str, str]]:
    """(what is typed, what is shown) of a console block."""
    assert block.text.startswith("$ "), f"line {block.line}: a console block begins with a command"
    return [(found[1], found[2]) for found in _COMMAND.finditer(block.text)]


def check_quotes(chapter: str) -> int:
    """Every quoted block must equal its file, or be a run of whole lines of it; returns how many there are."""
    quoted = [block for block in blocks(chapter) if block.path]
    for block in quoted:
        text = (TUTORIAL / str(block.path)).read_text(encoding="utf-8")
        same = block.text == text if block.quote == "file" else f"\n{block.text}" in f"\n{text}"
        assert same, f"{chapter}, line {block.line}: this is not what {block.path} says"
    return len(quoted)


def follow(chapter: str, folder: Path) -> int:
    """Do in the empty ``folder`` what ``chapter`` says, and compare what is shown; returns the number of commands.

    Packages are installed beside the folder, from what is on this machine.
    """
    work, site = folder / "work", folder / "site"
    work.mkdir()
    count = 0
    for block in blocks(chapter):
        if block.quote == "file":
            file = work / str(block.path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
        elif block.language == "console":
            for command, expected in commands(block):
                _type(command, expected, f"{chapter}, line {block.line}", work, _environment(site))
                count += 1
    return count


def _type(command: str, expected: str, where: str, work: Path, environment: dict[str, str]) -> None:
    code, shown = _run(command, work, environment)
    shown = re.sub(r"[ \t]+$", "", shown, flags=re.M)
    assert code == 0 or "\nerror:" in f"\n{shown}", f"{where}: `{command}` failed:\n{shown}"
    assert OutputChecker().check_output(expected, shown, ELLIPSIS | NORMALIZE_WHITESPACE), (
        f"{where}: `{command}` shows\n{shown}\ninstead of\n{expected}"
    )


def _run(command: str, work: Path, environment: dict[str, str]) -> tuple[int, str]:
    """The exit code of ``command``, and what it shows.

    One of `_PROGRAMS` runs in a process that is forked from one with the libraries, which saves the seconds of
    importing them; a shell runs everything else, and what the output of a program is piped through.
    """
    first, pipe, rest = command.partition(" | ")
    words = shlex.split(first.removesuffix(" 2>&1"))
    given, beside = None, ""
    if words[0] in _PROGRAMS:
        joined = not pipe or first.endswith(" 2>&1")
        told = json.dumps([environment, joined, str(Path(__file__).parents[1]), *words])
        done = run_fresh(
            _PROGRAM, told, folder=work, environment={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=250
        )  # fmt: skip
        if not pipe:
            return done.returncode, done.stdout
        command, given, beside = rest, done.stdout, done.stderr
    shell = subprocess.run(
        ["bash", "-c", command], cwd=work, env=environment, input=given, text=True, timeout=250,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return shell.returncode, beside + shell.stdout


def _environment(site: Path) -> dict[str, str]:
    """A terminal of 100 columns where pip needs no network and leaves this environment as it is."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LLMPRUNER_", "PYTEST_", "PIP_"))}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")])),
        "TUTORIAL": str(TUTORIAL),
        "COLUMNS": "100",
        "OMP_NUM_THREADS": "1",
        # Warnings of other packages depend on their versions.
        "PYTHONWARNINGS": "ignore",
        "PYTEST_ADDOPTS": "-p no:warnings -W ignore",
        "PIP_TARGET": str(site),
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        # pip's own reading of the variable: false switches the isolation off.
        "PIP_NO_BUILD_ISOLATION": "false",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
