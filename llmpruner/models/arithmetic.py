"""Multiply-accumulate operations of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from ..structure.coupling import ATTENTION, Role

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..structure.coupling import CouplingGraph


def macs_per_token(model: PreTrainedModel, graph: CouplingGraph, *, context: int = 512) -> int:
    """Multiply-accumulate operations to decode one token while ``context`` tokens are in the cache.

    One per weight of every linear layer, the language model head included (also where it is tied to the
    embedding, which itself is a look-up); of expert weights, the share of experts that a token is routed to; and
    for attention, ``context`` products per channel for the scores and again for the values.
    """
    weights = sum(
        parameter.numel() if routed is None else parameter.numel() // parameter.shape[0] * routed
        for _, parameter, routed in multiplied(model)
    )
    width = sum(
        span.index.width * group.units
        for group in graph.of_kinds([ATTENTION])
        for span in group.spans_with(Role.CONSUMES)
    )
    return weights + 2 * context * width


def multiplied(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter, int | None]]:
    """The parameters that tokens are multiplied by: (name, parameter, experts). ``experts``: for weights of experts,
    which are stacked along the first axis, how many of them a token is routed to; None for all others."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if path else leaf
            if parameter.ndim == 3 and not isinstance(module, nn.modules.conv._ConvNd):
                config = model.config.get_text_config()
                yield name, parameter, int(getattr(config, "num_experts_per_tok", parameter.shape[0]))
            elif parameter.ndim >= 2:
                yield name, parameter, None
