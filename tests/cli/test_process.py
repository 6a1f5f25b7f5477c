"""What only separate processes can show: exit codes, tracebacks, time, and the same bytes twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from fresh import run_fresh

COMMAND = [sys.executable, "-m", "llmpruner"]


def llmpruner(*arguments, **environment) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env={**os.environ, "COLUMNS": "300", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=250,
    )


def test_a_mistake_is_one_line_without_debug_and_a_traceback_with_it():
    plain = llmpruner("recipes", "tailor")
    assert (plain.returncode, plain.stdout, plain.stderr.count("\n")) == (2, "", 1)
    message = plain.stderr.removeprefix("error: ")
    for debug in (llmpruner("--debug", "recipes", "tailor"), llmpruner("recipes", "tailor", "--debug")):
        assert debug.returncode == 1
        assert "Traceback (most recent call last)" in debug.stderr
        assert debug.stderr.endswith(f"UnknownNameError: {message}")


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


def test_the_same_seed_gives_the_same_plan_byte_for_byte(run, dense, tmp_path):
    """In this process, after whatever tests ran in it, and in a new one with another seed of hashes."""
    options = ("plan", dense, "--ratio", 0.2, "--kinds", "mlp,attention", "--samples", 3, "--set", "prune.length=16")
    assert llmpruner(*options, "--set", "prune.seed=5", "-o", tmp_path / "new", PYTHONHASHSEED="1").returncode == 0
    for name, seed in (("here", 5), ("other", 6)):
        assert run(*options, "--set", f"prune.seed={seed}", "-o", tmp_path / name).code == 0
    new, here, other = ((tmp_path / name).read_bytes() for name in ("new", "here", "other"))
    assert new == here != other
