"""Several processes over gloo: plan and weights of one process, and how a run ends when one of them does."""

import os
import subprocess
import sys
import time

import many_processes
import psutil
import pytest
import torch
from criteria_cases import make
from ranks import run_ranks

EVERY = (*many_processes.CASES, "continued", "scores")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "cases"), [(2, EVERY), pytest.param(4, ("best", "experts", "squares"), marks=pytest.mark.long)]
)
def test_several_processes_give_the_result_of_one(count, cases, tmp_path):
    one, several = tmp_path / "one", tmp_path / "several"
    one.mkdir()
    several.mkdir()
    done = run_ranks("many_processes", of_1=(one, *cases), **{f"of_{count}": (several, *cases)})
    assert done.returncode == 0, done.stderr
    for case in cases:
        expected = torch.load(one / f"{case}-0.pt")
        for rank in range(count):
            found = torch.load(several / f"{case}-{rank}.pt")
            assert (found.get("plan"), found.get("kept")) == (expected.get("plan"), expected.get("kept")), case
            # Normed channels of the residual stream are correlated most, so that the fit amplifies rounding most.
            tolerance = 1e-3 if "residual" in case else 1e-5
            for name, wanted in expected["weights"].items():
                assert (found["weights"][name] - wanted).norm() <= tolerance * wanted.norm(), (case, rank, name)
    messages = {(several / f"refusal-{rank}.txt").read_text() for rank in range(count)}
    assert messages == {(one / "refusal-0.txt").read_text()}


@pytest.mark.slow
def test_a_mistake_is_one_line_of_one_process(tmp_path):
    done = run_ranks("llmpruner", of_2=("prune", tmp_path / "missing", "-o", tmp_path / "out", "--ratio", 0.2))
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "missing" in line and done.returncode == 2
    assert not (tmp_path / "out").exists()
    done = run_ranks("llmpruner", of_2=("evaluate", tmp_path / "missing"))
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert line == "error: `llmpruner evaluate` runs in one process; start it without torchrun or accelerate launch"
    assert done.returncode == 2


@pytest.mark.slow
def test_a_dead_process_ends_the_run_with_one_line_and_the_journal_stays(tmp_path):
    dense, output = tmp_path / "dense", tmp_path / "out"
    make("llama-gqa").network.save_pretrained(dense)
    settings = ("--ratio", 0.2, "--samples", 200, "--set", "prune.length=128", "--calibration", "self")
    command = ("prune", dense, "-o", output, *settings)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "llmpruner")
    run = subprocess.Popen(
        [*launcher, *map(str, command)], env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    journal = tmp_path / "out.pruning"
    while not (journal / "plan.json").exists():
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.01)
    next(p for p in psutil.Process(run.pid).children() if p.environ().get("RANK") == "1").kill()
    text, _ = run.communicate(timeout=60)
    assert run.returncode != 0
    (line,) = (line for line in text.splitlines() if line.startswith("error: "))
    assert line.startswith("error: another process of this run ended; the same command continues")
    assert (journal / "plan.json").exists() and not output.exists()
    done = run_ranks("llmpruner", of_2=command)
    assert done.returncode == 0, done.stderr
    assert output.exists() and not journal.exists()
    assert (done.stdout + done.stderr).count("✓") == 1
