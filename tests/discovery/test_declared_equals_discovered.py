"""Where a plugin declares its structure, discovery must find the same."""

from __future__ import annotations

import pytest
from llmpruner_llama.family import LlamaFamily
from transformers import LlamaConfig

from llmpruner.discovery.groups import discover_graph
from llmpruner.discovery.verify import differences


def agree(config: LlamaConfig) -> bool:
    declared, found = LlamaFamily().coupled_groups(config), discover_graph(config).groups
    same = [
        [(g.name, g.kind, g.units, g.layer, g.blocks, g.minimum, g.modules) for g in of] for of in (declared, found)
    ]
    return sorted(same[0]) == sorted(same[1]) and differences(declared, found) == []


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
    assert agree(config)


def test_equal_sizes_do_not_confuse_discovery() -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=4, num_key_value_heads=4, head_dim=4,
        num_hidden_layers=2, vocab_size=16,
    )  # fmt: skip
    assert agree(config)


def test_everything_is_offered() -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=24, num_attention_heads=4, num_hidden_layers=1, vocab_size=40
    )
    assert discover_graph(config).blocked == ()
