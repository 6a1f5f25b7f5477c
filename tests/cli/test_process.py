"""What only separate processes can show: exit codes, tracebacks, time, and the same bytes twice."""

import os
import signal
import subprocess
import sys

import pytest
from fresh import run_fresh

from llmpruner.cli import process

resource = pytest.importorskip("resource", reason="Windows has neither it nor signals that a process can answer")


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


LIBRARIES = "import pluggy, pydantic, rich.console, rich.markdown, rich.traceback, typer.rich_utils"


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
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


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


def test_a_terminated_command_leaves_nothing(tmp_path):
    done = run_fresh(TERMINATED, tmp_path, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr[-2000:]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_ended", [False, True])
def test_an_error_of_the_second_process_is_one_line_although_it_is_ended(is_ended, monkeypatch, capsys):
    """A launcher may end it while it waits for the first to print the error of both."""

    class Second:
        first = False

        def claim(self, what: str) -> bool:
            if is_ended:
                os.kill(os.getpid(), signal.SIGTERM)
            return not is_ended

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
    assert end.value.code == 2
    told = "" if is_ended else "error: out of memory (17 GiB); take fewer"
    assert capsys.readouterr().err.startswith(told)


def test_the_same_seed_gives_the_same_plan_byte_for_byte(run, dense, tmp_path):
    """In this process, after whatever tests ran in it, and in a new one with another seed of hashes."""
    options = ("plan", dense, "--ratio", 0.2, "--kinds", "mlp,attention", "--samples", 3, "--set", "prune.length=16")
    assert llmpruner(*options, "--set", "prune.seed=5", "-o", tmp_path / "new", PYTHONHASHSEED="1").returncode == 0
    for name, seed in (("here", 5), ("other", 6)):
        assert run(*options, "--set", f"prune.seed={seed}", "-o", tmp_path / name).code == 0
    new, here, other = ((tmp_path / name).read_bytes() for name in ("new", "here", "other"))
    assert new == here != other
