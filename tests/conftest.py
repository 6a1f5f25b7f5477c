"""Small models that every test can build in milliseconds, and a fresh plugin catalog.

With ``-n``, one process hands tests to the others: it needs none of what takes seconds to import, so that this is
imported where it is used.
"""

from __future__ import annotations

import copy
import gc
import os
import shutil
import tempfile
from functools import cache
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# Where transformers copies the code of checkpoints, also for the processes that tests start.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="llmpruner-modules-")

import pytest
from fresh import run_fresh

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from llmpruner import Catalog, Model
    from llmpruner.structure.coupling import CouplingGraph


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("numprocesses", None):
        return  # the workers run the tests
    from tiny_models import remembered

    from llmpruner.discovery import groups
    from llmpruner.testing import family

    family.run_python = run_fresh  # forked, without the seconds that importing torch and transformers takes
    groups.discover_graph = family.discover_graph = remembered(groups.discover_graph)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A test of the kits for plugin authors, whose projects need no such mark, starts two processes.
    for item in items:
        if item.name == "test_a_pruned_model_loads_in_fresh_processes":
            item.add_marker(pytest.mark.slow)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


def pytest_collection_finish() -> None:
    # What is imported stays: 400,000 objects that no collection of garbage needs to look at again.
    gc.collect()
    gc.freeze()


@pytest.fixture
def full_precision(monkeypatch):
    """Products are in the model's own precision on every processor."""
    monkeypatch.setattr("llmpruner.engine.walk.computes_bfloat16_fast", lambda model: False)


@pytest.fixture
def catalog() -> Catalog:

    from llmpruner import load_catalog

    return load_catalog()


LLAMAS = {"gqa": {}, "mha": {"num_key_value_heads": 8}, "tied": {"tie_word_embeddings": True}}


@cache
def structure(name: str) -> tuple[LlamaConfig, CouplingGraph]:
    from llmpruner_llama import LlamaFamily
    from transformers import LlamaConfig

    from llmpruner import build_graph

    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 128, "max_position_embeddings": 128,
    }  # fmt: skip
    config = LlamaConfig(**{**sizes, **LLAMAS[name]})
    return config, build_graph(LlamaFamily(), config)


def tiny(catalog: Catalog, name: str) -> Model:
    """Weights large enough that a wrong index shows in the logits."""
    import torch
    from transformers import LlamaForCausalLM

    from llmpruner import Model
    from llmpruner.discovery.opening import family_for
    from llmpruner.models.reference import Reference

    config, graph = structure(name)
    torch.manual_seed(0)
    model = LlamaForCausalLM(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in parameter_name else 0.0, 0.2)
    config = copy.deepcopy(config)
    return Model(Reference("tiny"), config, family_for(catalog, config), graph, network=model, tokenizer=None)


@pytest.fixture(params=LLAMAS)
def loaded(request, catalog) -> Model:
    """A tiny llama: grouped-query, multi-head, or with tied embeddings."""
    return tiny(catalog, request.param)


@pytest.fixture
def gqa(catalog) -> Model:
    return tiny(catalog, "gqa")
