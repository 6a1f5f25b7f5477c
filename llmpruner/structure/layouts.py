"""Functions that build the spans of common parameter layouts.

Each returns the spans of one coupled group; modules are named by their paths. ``bias=True`` adds the bias of each
producing projection, (out,). Weights have the shape (out, in), as in ``torch.nn.Linear``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .coupling import Blocks, IndexMap, Role, Span


def produces(module: str, index: IndexMap, *, bias: bool = False) -> list[Span]:
    """Rows of ``module.weight`` (and of ``module.bias``)."""
    leaves = ("weight", "bias") if bias else ("weight",)
    return [Span(f"{module}.{leaf}", 0, Role.PRODUCES, index) for leaf in leaves]


def consumes(module: str, index: IndexMap) -> list[Span]:
    """Columns of ``module.weight``."""
    return [Span(f"{module}.weight", 1, Role.CONSUMES, index)]


def two_layer_mlp(up: str, down: str, width: int, *, bias: bool = True) -> tuple[Span, ...]:
    """``down(act(up(x)))``, of weights (F, hidden) and (hidden, F); a unit is one of F = ``width`` channels."""
    return (*produces(up, Blocks(width), bias=bias), *consumes(down, Blocks(width)))


def hidden_channels(
    width: int,
    *,
    embeddings: Sequence[str],
    consumers: Sequence[str],
    producers: Sequence[str],
    norms: Sequence[str],
    biased: Collection[str] = (),
) -> tuple[Span, ...]:
    """The channels of the residual stream in a model with RMS norms; all arguments but ``width`` are module paths.
    ``embeddings``: (vocabulary, hidden). ``consumers``: projections whose inputs are hidden states, ``lm_head``
    included. ``producers``: projections whose outputs are added to the residual stream; those in ``biased`` have a
    bias. ``norms``: RMS norms over the hidden states."""
    channel = Blocks(width)
    return (
        *(Span(f"{m}.weight", 1, Role.PRODUCES, channel) for m in embeddings),
        *(s for m in producers for s in produces(m, channel, bias=m in biased)),
        *(Span(f"{m}.weight", 0, Role.NORM, channel) for m in norms),
        *(s for m in consumers for s in consumes(m, channel)),
    )
