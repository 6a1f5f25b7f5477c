"""Prunes small models in all processes of a launcher, or in one: ``python many_processes.py FOLDER CASE…``.

Every process writes what it has at the end to ``FOLDER/CASE-RANK.pt``.
"""

import contextlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from criteria_cases import make, tokens
from safetensors.torch import load_file

import llmpruner.engine.gradients
import llmpruner.engine.walk
import llmpruner.pipeline
from llmpruner import api
from llmpruner.engine.execution import Execution
from llmpruner.engine.journal import Journal
from llmpruner.engine.ranks import Ranks
from llmpruner.errors import LlmprunerError
from llmpruner.models.family import AutoFamily
from llmpruner.pruning.criteria.estimate import estimate
from llmpruner.pruning.criteria.whole import ExpertContribution

BEST = {"method": "best", "samples": 12, "length": 128}
CASES = {
    "best": ("llama-gqa", BEST),
    "experts": ("mixtral", BEST | {"importance": "energy"}),
    "whole experts": ("mixtral", BEST | {"kinds": "expert", "importance": "expert-frequency", "ratio": 0.25}),
    "experts with biases": ("gpt_oss", BEST | {"samples": 2, "length": 12}),
    "channels of the residual stream": ("llama-gqa", BEST | {"kinds": "mlp,hidden"}),
    "biases": ("gpt2", BEST | {"importance": "flap", "compensate": "bias", "allocation": "global", "shape": "free"}),
    "gram": ("llama-gqa", BEST | {"importance": "obs", "kinds": "mlp", "allocation": "sensitivity", "shape": "free"}),
    "taylor": ("llama-gqa", {"method": "llm-pruner", "length": 32, "steps": 2}),
    "squares": (
        "mixtral",
        {"importance": "taylor", "settings": {"taylor": {"variant": "mix"}}, "samples": 7, "length": 16},
    ),
    "layers": ("llama-gqa", BEST | {"kinds": "layer", "ratio": 0.35}),
}

PLANNED = ("best", "taylor")
"""Cases that also make a plan alone."""


class Stated(AutoFamily):
    """States what follows a cut, for which small models are searched otherwise, for seconds."""

    def refresh(self, model):
        for module in model.modules():
            if hasattr(module, "num_experts") and hasattr(module, "weight"):  # a router
                module.num_experts = len(module.weight)
            if hasattr(module, "num_experts") and hasattr(module, "down_proj"):
                module.num_experts = len(module.down_proj)


def model_of(name):
    """One of the models of `make`, with noise: the fit of weights of low rank would amplify rounding."""
    model = make(name)
    if isinstance(model.family, AutoFamily):
        model = replace(model, family=Stated())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5 * parameter.std())
    return model


def outcome(case):
    """The kept units and the weights after a prune, and the units of a plan alone."""
    name, settings = CASES[case]
    settings = {"ratio": 0.2, "calibration": "self", **settings}
    planned = api.plan(model_of(name), **settings).kept if case in PLANNED else None
    pruned = api.prune(model_of(name), **settings)
    return {"plan": planned, "kept": pruned.plans[-1].kept, "weights": pruned.network.state_dict()}


class Interrupted(Exception):
    pass


def continued(folder):
    """The weights of a run with two ratios that was interrupted after its second layer, and continued."""
    model, output = folder / "model", folder / "output"
    if int(os.environ.get("RANK", "0")) == 0:
        model_of("llama-gqa").network.save_pretrained(model)
    Ranks.current().wait()
    ratios = [0.2, 0.3]
    settings = {"ratios": ratios, "calibration": "self", "output": output, **BEST}
    done = []

    def once(self, state, states):
        own(self, state, states)
        done.append(state["layers"])
        if done == [1, 2]:
            raise Interrupted

    own = Journal.layer_done
    with patch.object(Journal, "layer_done", once), patch("llmpruner.engine.journal.SHARE", 1e9):
        with contextlib.suppress(Interrupted):
            api.prune_each(model, **settings)
        api.prune_each(model, **settings)
    assert done == [1, 2, 3], "one walk for both"
    assert not (folder / "output.pruning").exists() or not Ranks.current().first
    files = {ratio: load_file(output / f"{ratio}" / "model.safetensors") for ratio in ratios}
    return {"weights": {(ratio, name): tensor for ratio in ratios for name, tensor in files[ratio].items()}}


def scores():
    """Scores of whole experts, by sums over the tokens of all processes."""
    model = model_of("mixtral")
    criterion = ExpertContribution()
    execution = Execution.of(model.network, model.graph.layers, Ranks.current())
    groups, text = model.graph.of_kinds(["expert"]), tokens(12, 128)
    return {"weights": estimate(model.network, model.graph, groups, criterion, text, execution=execution)}


def refusal():
    """A message that only the first process knows."""
    try:
        api.prune(make("llama-gqa"), ratio=0.999, method="llm-pruner", calibration="self", steps=2)
    except LlmprunerError as error:
        return str(error)
    raise AssertionError


def prepare():
    """Makes text at once, and micro-batches small, so that there are three or more."""
    torch.set_num_threads(1)
    llmpruner.pipeline.calibrate = lambda model, job, execution: tokens(job.calibration.samples, job.calibration.length)
    llmpruner.engine.walk.computes_bfloat16_fast = lambda model: False
    llmpruner.engine.walk.TOKENS_AT_ONCE = 4 * 128
    llmpruner.engine.gradients.TOKENS_WITH_GRADIENTS = 4 * 32


if __name__ == "__main__":
    prepare()
    folder, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
    others = {"continued": lambda: continued(folder), "scores": scores}
    for each in sys.argv[2:]:
        found = others[each]() if each in others else outcome(each)
        torch.save(found, folder / f"{each}-{rank}.pt")
    (folder / f"refusal-{rank}.txt").write_text(refusal())
