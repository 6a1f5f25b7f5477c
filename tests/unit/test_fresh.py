"""Programs in processes of their own, which are forked from one that has imported transformers."""

from __future__ import annotations

import json
import os
import time

import pytest

from llmpruner.testing import fresh
from llmpruner.testing.fresh import run_fresh

pytestmark = pytest.mark.slow

TOLD = """
import json, os, sys
own = [name for name in sys.modules if name.startswith("llmpruner")]
given = (sys.argv[1:], sys.stdin.read(), os.getcwd(), os.environ.get("ONE"), own)
sys.stdout.write(json.dumps(given))
sys.stderr.write("told")
sys.exit(7)
"""


def test_what_a_program_is_given_and_gives(tmp_path):
    done = run_fresh(TOLD, tmp_path, 3, folder=tmp_path, environment={**os.environ, "ONE": "1"})
    assert (done.returncode, done.stderr) == (7, "told")
    assert json.loads(done.stdout) == [[str(tmp_path), "3"], "", str(tmp_path), "1", []]


def test_one_program_leaves_nothing_to_the_next():
    first = run_fresh("import os, sys, json.tool; json.mark = os.environ['MARK'] = 'x'; import llmpruner; print(1)")
    again = run_fresh(
        "import os, sys, json; print(hasattr(json, 'mark'), 'MARK' in os.environ, 'llmpruner' in sys.modules)"
    )
    assert (first.stdout, again.stdout) == ("1\n", "False False False\n"), (first.stderr, again.stderr)


@pytest.mark.skipif(not fresh._FORKS, reason="without fork, every program is started anew")
def test_one_server_gives_each_program_its_own_variables(monkeypatch):
    """Each test has another cache folder: a server for each took most of the time of the tests."""
    told = "import os; print(os.environ['LLMPRUNER_CACHE'], os.getppid())"
    found = []
    for folder in ("one", "two"):
        monkeypatch.setenv("LLMPRUNER_CACHE", folder)
        found.append(run_fresh(told).stdout.split())
    assert [folder for folder, _ in found] == ["one", "two"] and found[0][1] == found[1][1]


def test_an_error_is_the_last_line():
    done = run_fresh("raise ValueError('so it is')")
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "ValueError: so it is"


@pytest.mark.skipif(not fresh._FORKS, reason="without fork, subprocess limits the time")
def test_a_program_that_hangs_is_ended():
    started = time.monotonic()
    assert run_fresh("import time; time.sleep(100)", timeout=1).returncode < 0
    assert time.monotonic() - started < 60
    assert run_fresh("print(2)").stdout == "2\n"
