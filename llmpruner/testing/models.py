"""Tiny models, a tokenizer, and small pruning jobs."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig, PreTrainedTokenizerFast

from ..discovery.groups import build_graph
from ..discovery.tiny import random_instance
from ..engine.execution import Execution
from ..models.family import ModelFamily
from ..models.model import Model
from ..models.reference import Reference
from ..pipeline import prune_model, select
from ..plugins.installed import load_catalog
from ..pruning.job import PruneJob, prune_job, replay_job
from ..settings import PruneSettings
from ..structure.plan import PruningPlan
from .components import catalog_with

_SIZES = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 3,
    "head_dim": 8, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def tiny_llama(seed: int = 0) -> Model:
    """A random LLaMA: 3 layers of 3 KV heads with 2 query heads, 40 MLP and 48 hidden channels. No weight is zero."""
    return _copy(_built(LlamaConfig, "llama", seed))


def tiny_mixture() -> Model:
    """A random Mixtral with the sizes of `tiny_llama` and 7 experts in each of 3 layers, of which a token gets 2."""
    return _copy(_built(MixtralConfig, "auto", 0, num_local_experts=7, num_experts_per_tok=2))


@cache
def _built(configuration: type[PreTrainedConfig], name: str, seed: int, **sizes: int) -> Model:
    config = configuration(num_hidden_layers=3, **_SIZES, **sizes)
    family = load_catalog()[ModelFamily][name]()
    model = random_instance(config, seed)
    return Model(Reference("tiny"), config, family, build_graph(family, config), network=model, tokenizer=None)


def _copy(built: Model) -> Model:
    # This takes a fraction of the time in which transformers builds a model.
    model, config = copy.deepcopy(built.network), copy.deepcopy(built.config)
    return replace(built, network=model, config=config, tokenizer=letters())


def letters() -> Any:
    """A tokenizer of single letters, with ids below 60."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{chr(97 + n): 20 + n for n in range(26)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def small_job(**changes: Any) -> PruneJob:
    """A job that removes a fifth of the decoder as MLP channels, in equal shares, by l1. ``changes``: its fields."""
    settings = PruneSettings(ratio=0.2, shape="free", importance="l1", compensate="none")
    return replace(prune_job(settings, catalog_with()), **changes)


def make_plan(model: Model, job: PruneJob) -> PruningPlan:
    """The plan of a job that reads no text."""
    return select(model, job, None, Execution(model.weights))


def cut_by(model: Model, plan: PruningPlan) -> Model:
    """``model``, cut in place by ``plan``."""
    return prune_model(model, replay_job(plan, catalog_with()))


def first_change(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], atol: float = 0.0) -> str:
    """The first difference of two state dicts in words; empty when there is none."""
    for name in (*before, *after):
        if name not in before or name not in after:
            return f"parameter '{name}' exists only {'after' if name in after else 'before'}"
        old, new = before[name], after[name]
        if old.shape != new.shape:
            return f"parameter '{name}' has shape {tuple(old.shape)} and {tuple(new.shape)}"
        difference = float((old.double() - new.double()).abs().max())
        if not difference <= atol:
            return f"parameter '{name}' differs by up to {difference:.1e}"
    return ""


def scramble(seed: int) -> None:
    """Seed all global random generators, on which results must not depend."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
