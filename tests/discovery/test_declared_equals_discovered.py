"""Where a plugin declares its structure, discovery must find the same."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from llmpruner_llama.family import LlamaFamily
from transformers import LlamaConfig

from llmpruner import CoupledGroup
from llmpruner.discovery.groups import discover_graph, discover_groups


def facts(groups: Sequence[CoupledGroup]) -> dict[str, object]:
    """All values of a group, with spans in one order and maps in one form."""
    return {
        g.name: (
            g.kind,
            g.units,
            g.layer,
            g.blocks,
            g.minimum,
            g.modules,
            {
                (s.parameter, s.axis, s.role, s.offset, u, tuple(s.indices([u])))
                for s in g.spans
                for u in range(g.units)
            },
        )
        for g in groups
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 6},
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True, "head_dim": 10},
    ],
    ids=["gqa", "mha", "biases", "tied"],
)
def test_llama(changes: dict[str, object]) -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = LlamaConfig(**{**sizes, "num_hidden_layers": 3, "vocab_size": 64, **changes})
    assert facts(discover_groups(config)) == facts(LlamaFamily().coupled_groups(config))


def test_equal_sizes_do_not_confuse_discovery() -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=4, num_key_value_heads=4, head_dim=4,
        num_hidden_layers=2, vocab_size=16,
    )  # fmt: skip
    assert facts(discover_groups(config)) == facts(LlamaFamily().coupled_groups(config))


def test_everything_is_offered() -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=24, num_attention_heads=4, num_hidden_layers=1, vocab_size=40
    )
    assert discover_graph(config).blocked == ()
