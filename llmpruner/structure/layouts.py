"""Functions that build the spans of common parameter layouts.

Each returns the spans of one coupled group; modules are named by their paths. ``bias=True`` adds the bias of each
producing projection, (out,). Weights have the shape (out, in), as in ``torch.nn.Linear``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .coupling import VOCABULARY, Blocks, CoupledGroup, IndexMap, Role, Span


def produces(module: str, index: IndexMap, *, bias: bool = False) -> list[Span]:
    """Rows of ``module.weight`` (and of ``module.bias``)."""
    leaves = ("weight", "bias") if bias else ("weight",)
    return [Span(f"{module}.{leaf}", 0, Role.PRODUCES, index) for leaf in leaves]


def consumes(module: str, index: IndexMap) -> list[Span]:
    """Columns of ``module.weight``."""
    return [Span(f"{module}.weight", 1, Role.CONSUMES, index)]


def gated_mlp(gate: str, up: str, down: str, width: int, *, bias: bool = False) -> tuple[Span, ...]:
    """``down(act(gate(x)) · up(x))`` with separate gate and up projections; a unit is one of F = ``width`` channels.
    Weights: ``gate`` and ``up`` (F, hidden), ``down`` (hidden, F)."""
    return (*produces(gate, Blocks(width), bias=bias), *two_layer_mlp(up, down, width, bias=bias))


def two_layer_mlp(up: str, down: str, width: int, *, bias: bool = True) -> tuple[Span, ...]:
    """``down(act(up(x)))``; a unit is one of F = ``width`` channels.
    Weights: ``up`` (F, hidden), ``down`` (hidden, F)."""
    return (*produces(up, Blocks(width), bias=bias), *consumes(down, Blocks(width)))


def grouped_query_attention(
    q: str, k: str, v: str, o: str, heads: int, kv_heads: int, head_dim: int, *, bias: bool = False
) -> tuple[Span, ...]:
    """Separate projections; a unit is one KV head with its ``heads/kv_heads`` query heads, which follow one another.
    Weights: ``q`` (heads · head_dim, hidden), ``k`` and ``v`` (kv_heads · head_dim, hidden), ``o`` (hidden, heads ·
    head_dim)."""
    query, key = Blocks(kv_heads, heads // kv_heads * head_dim), Blocks(kv_heads, head_dim)
    return (
        *produces(q, query, bias=bias),
        *produces(k, key, bias=bias),
        *produces(v, key, bias=bias),
        *consumes(o, query),
    )


def query_heads(q: str, o: str, heads: int, head_dim: int, *, bias: bool = False) -> tuple[Span, ...]:
    """Query heads alone; the group must set ``blocks`` to the number of KV heads. Weights as in
    `grouped_query_attention`."""
    head = Blocks(heads, head_dim)
    return (*produces(q, head, bias=bias), *consumes(o, head))


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


def vocabulary(tokens: int, *modules: str) -> CoupledGroup:
    """The group of the tokens of a vocabulary. ``modules``: paths of the embedding and of the head."""
    spans = tuple(Span(f"{m}.weight", 0, Role.PRODUCES, Blocks(tokens)) for m in modules)
    return CoupledGroup("vocabulary", VOCABULARY, tokens, spans)
