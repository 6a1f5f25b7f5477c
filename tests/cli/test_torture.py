"""A short part of ``make torture``."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import mutations, soak, torture
from benchmarks.tiny_checkpoints import Work

pytestmark = [pytest.mark.long, pytest.mark.skipif(sys.platform != "linux", reason="mounts, and limits of memory")]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Work:
    folder = tmp_path_factory.mktemp("torture")
    subprocess.run([sys.executable, "-m", "benchmarks.tiny_checkpoints", str(folder)], check=True)
    return Work(folder)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("command", ["prune", "convert"])
def test_faults_lose_nothing(work, tmp_path, command):
    rows = list(torture.faults(work, tmp_path, 1, random.Random(0), [command]))
    assert sum(row.runs for row in rows) >= len(torture.SIGNALS) + 2
    assert not [(row.fault, row.lines) for row in rows if row.lost or row.wrong or row.tracebacks]


@pytest.mark.timeout(1200)
def test_damaged_files_are_refused(work, tmp_path):
    tallies = mutations.mutate(work, tmp_path / "mutated", 6, 0)
    assert all(tally.inputs == 6 and tally.refused + tally.taken for tally in tallies)
    assert not [line for tally in tallies for line in tally.lines]


@pytest.mark.timeout(1200)
def test_many_prunes_in_one_process_leave_nothing(work):
    uses = soak.soak(work, 30)
    assert [use.cycles for use in uses] == list(range(3, 31, 3))
    assert not soak.grown(uses)


@pytest.mark.parametrize("what", ["mib", "files", "threads", "objects"])
def test_what_grows_is_named(what):
    flat = [soak.Use(20 * n, 500.0, 20, 3, 400_000) for n in range(1, 11)]
    assert not soak.grown(flat)
    more = {"mib": 40.0, "objects": 500}.get(what, 1)
    assert soak.grown([*flat[:-1], replace(flat[-1], **{what: getattr(flat[-1], what) + more})])


def test_what_is_done_outside_is_seen(tmp_path):
    """The hook itself, in a process of its own, as hooks cannot be removed."""
    script = """
import os, subprocess, sys
from benchmarks.mutations import _hook
seen = os.open(sys.argv[1] + "/seen", os.O_WRONLY | os.O_CREAT)
sys.addaudithook(_hook(sys.argv[1] + "/inside", seen))
open(sys.argv[1] + "/inside-file", "w").close()
open(sys.argv[1] + "/outside", "w").close()
subprocess.run(["true"])
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
    seen = (tmp_path / "seen").read_text()
    assert "opened for writing" in seen and "/outside" in seen and "subprocess.Popen" in seen
