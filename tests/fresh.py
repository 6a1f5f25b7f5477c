"""Python programs in processes of their own, without the seconds that each import of torch and transformers takes."""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SERVER = """
import gc, importlib, json, os, signal, sys
import torch, transformers.models.auto.modeling_auto, transformers.models.llama.modeling_llama
# A process looks for garbage as it ends, among all that was imported: a second or more. What is frozen is not freed,
# which the bindings of triton would print as leaks.
gc.collect()
if "triton" not in sys.modules:
    gc.freeze()
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    signal.alarm(job["timeout"])
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    for number, path in enumerate((os.devnull, job["out"], job["err"])):
        os.dup2(os.open(path, os.O_WRONLY if number else os.O_RDONLY), number)
    importlib.invalidate_caches()
    sys.argv = ["-c", *job["arguments"]]
    exec(job["code"], {"__name__": "__main__"})
    sys.exit()
"""
_FORKS = sys.platform == "linux"
"""Windows has no fork, and on macOS it is unsafe once libraries are loaded."""
_SERVERS: dict[frozenset[tuple[str, str]], subprocess.Popen[str]] = {}
_MOST = 3
"""Servers at a time; the oldest ends first."""


def run_fresh(
    code: str,
    *arguments: object,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: int = 300,
) -> subprocess.CompletedProcess[str]:
    """Run the program ``code`` in a process that has not imported llmpruner: ``python -c CODE ARGUMENTS``.

    ``folder``: to run it in; ``environment``: its variables; both default to those of this process. Standard input is
    empty. On Linux the process is forked from one that has imported transformers, which later calls with the same
    environment, but for llmpruner's own variables, share.
    """
    values = dict(os.environ if environment is None else environment)
    # pytest writes the name of the test there.
    values.pop("PYTEST_CURRENT_TEST", None)
    texts = [str(argument) for argument in arguments]
    if not _FORKS:
        return subprocess.run(
            [sys.executable, "-c", code, *texts], cwd=folder, env=values, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        out, err = Path(work, "out"), Path(work, "err")
        out.touch()
        err.touch()
        job = {
            "code": code, "arguments": texts, "folder": str(folder or Path.cwd()), "environment": values,
            "timeout": timeout, "out": str(out), "err": str(err),
        }  # fmt: skip
        status = _ask(_server(values), job)
        return subprocess.CompletedProcess(
            [sys.executable, "-c", code, *texts],
            status,
            out.read_text(encoding="utf-8", errors="replace"),
            err.read_text(encoding="utf-8", errors="replace"),
        )


def _ask(server: Any, job: Mapping[str, Any]) -> int:
    """The exit code of ``job``."""
    try:
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())
    except BaseException:
        # The answer, if there will be one, must not be taken for that of the next job.
        server.kill()
        raise


def _server(environment: Mapping[str, str]) -> subprocess.Popen[str]:
    # Nothing that a server imports reads llmpruner's own variables.
    key = frozenset((name, value) for name, value in environment.items() if not name.startswith("LLMPRUNER_"))
    if key not in _SERVERS or _SERVERS[key].poll() is not None:
        _SERVERS.pop(key, None)
        while len(_SERVERS) >= _MOST:
            _end(_SERVERS.pop(next(iter(_SERVERS))))
        _SERVERS[key] = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    return _SERVERS[key]


def _end(server: subprocess.Popen[str]) -> None:
    """A server ends with its standard input, and so with the process that started it."""
    try:
        server.communicate(timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        server.kill()


@atexit.register
def _end_all() -> None:
    while _SERVERS:
        _end(_SERVERS.popitem()[1])
