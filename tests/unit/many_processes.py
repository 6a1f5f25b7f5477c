"""Prunes small models in all processes of a launcher, or in one: ``python many_processes.py FOLDER``.

Every process writes what it has at the end to ``FOLDER/CASE-RANK.pt``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from criteria_cases import make

import llmpruner.engine.gradients
import llmpruner.engine.walk
from llmpruner import api
from llmpruner.errors import LlmprunerError

BEST = {"method": "best", "samples": 80, "length": 128}  # three micro-batches
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "best": ("llama-gqa", BEST),
    "experts": ("mixtral", BEST),
    "experts with biases": ("gpt_oss", BEST | {"samples": 2, "length": 12}),
    "channels of the residual stream": ("llama-gqa", BEST | {"kinds": "mlp,hidden"}),
    "biases": ("gpt2", BEST | {"importance": "flap", "compensate": "bias", "allocation": "global"}),
    "gram": ("llama-gqa", BEST | {"importance": "obs", "kinds": "mlp", "allocation": "sensitivity"}),
    "taylor": ("llama-gqa", {"method": "llm-pruner", "length": 32, "steps": 2}),
    "squares": ("mixtral", {"importance": "taylor", "variant": "mix", "samples": 7, "length": 16}),
    "layers": ("llama-gqa", {"method": "best", "kinds": "layer", "samples": 80, "length": 128, "ratio": 0.35}),
}


def outcome(case: str) -> dict[str, Any]:
    """The kept units and the weights after a prune, and the units of a plan alone."""
    name, settings = CASES[case]
    settings = {"ratio": 0.2, "calibration": "self", **settings}
    planned = api.plan(make(name), **settings)
    pruned = api.prune(make(name), **settings)
    return {"plan": planned.kept, "kept": pruned.plans[-1].kept, "weights": pruned.model.state_dict()}


def refusal() -> str:
    """A message that only the first process knows."""
    try:
        api.prune(make("llama-gqa"), ratio=0.2, calibration="missing.txt", method="best")
    except LlmprunerError as error:
        return str(error)
    raise AssertionError


def prepare() -> None:
    """As few numbers as possible that depend on the machine, and several micro-batches for gradients."""
    torch.set_num_threads(1)
    llmpruner.engine.walk.computes_bfloat16_fast = lambda model: False
    llmpruner.engine.gradients._LOGIT_ELEMENTS = 4 * 32 * 96


if __name__ == "__main__":
    prepare()
    folder, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
    for each in CASES:
        torch.save(outcome(each), folder / f"{each}-{rank}.pt")
    (folder / f"refusal-{rank}.txt").write_text(refusal())
