"""What only separate processes can show: exit codes, tracebacks, time, and the same bytes twice; and progress where
standard error is no terminal."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from fresh import run_fresh

from llmpruner.cli import console, process
from llmpruner.cli.console import RichProgress, sizes_text
from llmpruner.component import Component

has_signals = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signal that a process can answer")


def llmpruner(*arguments, **environment) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmpruner", *map(str, arguments)]
    variables = {**os.environ, "COLUMNS": "300", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=250)


def test_a_mistake_is_one_line_without_debug_and_a_traceback_with_it():
    plain = llmpruner("recipes", "tailor")
    assert (plain.returncode, plain.stdout, plain.stderr.count("\n")) == (2, "", 1)
    message = plain.stderr.removeprefix("error: ")
    for debug in (llmpruner("--debug", "recipes", "tailor"), llmpruner("recipes", "tailor", "--debug")):
        assert debug.returncode == 1
        assert "Traceback (most recent call last)" in debug.stderr
        assert debug.stderr.endswith(f"UnknownNameError: {message}")


class Brittle(Component):
    kind, name = "criterion", "brittle"

    def score(self):
        return 1 / 0


def test_an_exception_of_a_plugin_is_one_line_and_one_of_the_core_is_not(capsys):
    with pytest.raises(SystemExit, match="2"):
        process.run(lambda: Brittle().score(), [], debug=False)
    found = capsys.readouterr().err
    assert found.startswith("error: criterion brittle of test_process failed in test_process.py, line ")
    assert found.endswith(": ZeroDivisionError: division by zero; --debug shows the traceback\n")
    assert found.count("\n") == 1
    with pytest.raises(ZeroDivisionError):
        process.run(lambda: Brittle().score(), [], debug=True)
    with pytest.raises(KeyError):
        process.run(lambda: {}["a"], [], debug=False)


LIBRARIES = "import pluggy, pydantic, rich.console, rich.markdown, rich.traceback, typer.rich_utils"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not count it")
def test_help_takes_less_than_half_a_second():
    """Of processor time, with compiled modules, as an installation has them. On a machine that is slow or busy, at most
    two and a half times what the libraries of a command line take there."""
    compiled = {"PYTHONDONTWRITEBYTECODE": ""}
    helps, libraries = [], []
    for _ in range(20):
        before = _children()
        done = llmpruner("--help", **compiled)
        helps.append(_children() - before)
        assert done.returncode == 0 and "Usage: llmpruner" in done.stdout
        before = _children()
        subprocess.run([sys.executable, "-c", LIBRARIES], env=os.environ | compiled, check=True)
        libraries.append(_children() - before)
        if min(helps) < max(0.5, 2.5 * min(libraries)) and len(helps) > 1:
            break
    assert 0 < min(helps) < max(0.5, 2.5 * min(libraries)), (helps, libraries)


def _children() -> float:
    """Processor time of all processes that ended, in seconds."""
    return sum(os.times()[2:4])


TERMINATED = """
import os, signal, sys, time
from pathlib import Path
from llmpruner.cli import app as commands, main
from llmpruner.files import new_directory

def app(**_):
    with new_directory(Path(sys.argv[1]) / "out") as partial:
        (partial / "half").write_text("half")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

commands.build_app = lambda: app
main()
"""


@has_signals
def test_a_terminated_command_leaves_nothing(tmp_path):
    done = run_fresh(TERMINATED, tmp_path, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr[-2000:]
    assert not list(tmp_path.iterdir())


@has_signals
def test_the_second_process_is_ended_without_a_line(monkeypatch, capsys):
    """By a launcher, while it waits for the first to print the error of both."""

    class Second:
        first = False

        def claim(self, what: str) -> bool:
            os.kill(os.getpid(), signal.SIGTERM)
            return False

    def short_of_memory():
        raise MemoryError("17 GiB")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("llmpruner.engine.ranks.Ranks.current", Second)
    monkeypatch.setattr(process, "_exit", sys.exit)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            process.run(short_of_memory, ["prune"], debug=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 2 and capsys.readouterr().err == ""


def test_the_same_seed_gives_the_same_plan_byte_for_byte(run, dense, tmp_path):
    """In this process, after whatever tests ran in it, and in a new one with another seed of hashes."""
    options = ("plan", dense, "--ratio", 0.2, "--kinds", "mlp,attention", "--samples", 3, "--set", "prune.length=16")
    assert llmpruner(*options, "--set", "prune.seed=5", "-o", tmp_path / "new", PYTHONHASHSEED="1").returncode == 0
    for name, seed in (("here", 5), ("other", 6)):
        assert run(*options, "--set", f"prune.seed={seed}", "-o", tmp_path / name).code == 0
    new, here, other = ((tmp_path / name).read_bytes() for name in ("new", "here", "other"))
    assert new == here != other


def test_a_line_a_minute(capsys, monkeypatch):
    progress = RichProgress()
    with progress.bar("Measuring [inputs]") as at:
        at(0.25, "Measuring [inputs]")
    assert capsys.readouterr().err == "", "no minute has passed"
    progress.status("loading model")
    monkeypatch.setattr(console, "_LINE_EVERY", 0.02)
    for _ in progress.track(["a", "b", "c", "d"], "Measuring [inputs]"):
        time.sleep(0.1)
    first, *_, half, last = capsys.readouterr().err.splitlines()
    assert first == "• loading model"
    assert half.startswith("• Measuring [inputs], 50% done, 0:00:0")
    assert last.startswith("• Measuring [inputs], 75% done, 0:00:0")


def test_sizes_are_next_to_those_of_the_dense_model(tmp_path):
    (tmp_path / "q4.gguf").write_bytes(b"x" * 2**20)
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    (pruned / "model.safetensors").write_bytes(b"x" * 2**21)
    (pruned / "llmpruner.json").write_text(json.dumps({"base_path": str(tmp_path / "q4.gguf")}))
    assert "2.0 MiB of weights (q4.gguf: 1.0 MiB); quantise it: export --to gguf --set" in sizes_text(pruned, pruned)
    (pruned / "model.safetensors").write_bytes(b"x" * 2**19)
    assert sizes_text(pruned, pruned) == "0.5 MiB of weights (q4.gguf: 1.0 MiB); "
    # Float16 that became float32 need not be quantised: ChatGLM, for example, has no GGUF.
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "model.safetensors").write_bytes(b"x" * 2**18)
    (pruned / "llmpruner.json").write_text(json.dumps({"base_path": str(tmp_path / "dense")}))
    told = "0.5 MiB of weights (dense: 0.2 MiB); --dtype float16 or bfloat16 keeps 16 bits; "
    assert sizes_text(pruned, pruned) == told


def test_brackets_and_colons_of_paths_are_printed(run, dense, tmp_path):
    """They are neither markup nor emoji."""
    made = tmp_path / "o[v2]:100:"
    done = run("prune", dense, "--set", "prune.unit_ratio=0.25", "--importance", "l1", "-o", made)
    assert str(made) in done.out, done.err
    assert str(made) in run("verify", made).out
