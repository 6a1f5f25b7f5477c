"""A tiny dense model and a pruned copy of it, for tests of strategies that need both."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from llmpruner.models.model import Model
from llmpruner.models.surgery import cut
from llmpruner.testing.models import tiny_llama


def dense_llama() -> Model:
    """`tiny_llama` with larger weights, so that its predictions differ clearly from those of its cuts."""
    loaded = tiny_llama()
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    return loaded


def pruned_copy(dense: Model) -> Model:
    """Of `dense_llama`, with layers that were cut unevenly."""
    own = replace(dense, model=copy.deepcopy(dense.model))
    kept = {"layers.0.mlp": range(30), "layers.1.mlp": range(3, 40), "layers.1.attention": [0, 2]}
    return replace(own, graph=cut(own.model, own.graph, kept, own.family))
