"""Tests of what runs on an accelerator, on a stand-in (`stand_in`). Registering it changes a whole process, and which
device `--device auto` finds: `on_device` runs a function of a test in a process of its own."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fresh import run_fresh

_CODE = """
import importlib, json, sys
import torch
torch.set_num_threads(1)  # sums of several threads depend on their number
module, function, arguments, sys.path[:0] = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
import stand_in
stand_in.start()
result = getattr(importlib.import_module(module), function)(*arguments)
print("\\n" + json.dumps(result))
"""


@pytest.fixture
def on_device(tmp_path: Path) -> Callable[..., Any]:
    """Call a function of a test module with JSON values, in a process with the stand-in; returns its result."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("the stand-in accelerator needs Linux and g++")

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        done = run_fresh(
            _CODE, function.__module__, function.__name__, json.dumps(arguments), json.dumps(sys.path), folder=tmp_path
        )
        if done.returncode:
            pytest.fail(f"{done.stdout[-1000:]}{done.stderr[-4000:]}", pytrace=False)
        return json.loads(done.stdout.splitlines()[-1])

    return call
