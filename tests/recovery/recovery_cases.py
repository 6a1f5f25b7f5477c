"""Tiny dense and pruned models, data for them, and one function that trains."""

import copy
import json
from types import SimpleNamespace

import tiny_models
import torch
from llmpruner_llama import LlamaFamily

from llmpruner import Model, build_graph
from llmpruner.discovery.cut import cut
from llmpruner.models.reference import Reference
from llmpruner.recovery.base import nothing
from llmpruner.recovery.data import RecoverySetup, prepare, read_data
from llmpruner.recovery.recover import train
from llmpruner.settings import RecoverSettings

FAMILY = LlamaFamily()
ROWS = [{"prompt": f"Question {n}:\n", "completion": "It is so. " * (n % 4 + 1)} for n in range(24)]
SETTINGS = {"batch_size": 4, "micro_batch_size": 2, "max_steps": 6, "learning_rate": 5e-3, "cutoff": 24}


def dense_model(dtype=torch.float32):
    """With weights large enough that its predictions differ clearly from those of its cuts."""
    model = tiny_models.llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() == 2 else 1)
    return model.to(dtype)


def pruned_model(dtype=torch.float32, tied=False):
    """A cut of `dense_model`, with layers that differ in heads and in width; and its graph."""
    model = tiny_models.llama(tied=True) if tied else dense_model()
    kept = {"layers.0.mlp": range(30), "layers.1.mlp": range(3, 48), "layers.1.attention": [1]}
    graph = cut(model, build_graph(FAMILY, model.config), kept, FAMILY)
    return model.to(dtype), graph


def write_lines(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def model_of(model, graph=None):
    return Model(Reference("tiny"), model.config, FAMILY, graph, network=model, tokenizer=tiny_models.tokenizer())


def train_tiny(
    folder, strategy, pruned=None, *, load_teacher=None, predictions=lambda rows: None, on_step=nothing,
    recomputes=False, **changes,
):  # fmt: skip
    """The result of a training in ``folder``, with its ``record``. ``changes``: of `SETTINGS`."""
    folder.mkdir(exist_ok=True)
    settings = RecoverSettings(data=write_lines(folder / "data.jsonl"), **{**SETTINGS, **changes})
    loaded = model_of(*(pruned or pruned_model()))
    data = prepare(settings, read_data(settings.data), FAMILY, loaded.tokenizer)
    teacher = load_teacher or (lambda: copy.deepcopy(dense_model(loaded.network.dtype)))
    result, record = train(
        loaded, RecoverySetup(settings, strategy), data, folder / "work", teacher,
        predictions([*data.rows, *data.validation]), on_step=on_step, recomputes=recomputes,
    )  # fmt: skip
    return SimpleNamespace(**vars(result), record=record)
