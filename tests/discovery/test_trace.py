"""A trace that fails raises an error with the reason, and prints nothing."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from llmpruner.discovery.groups import discover_groups
from llmpruner.discovery.trace import export, trace
from llmpruner.errors import UnsupportedModelError
from llmpruner.oracle.tiny import small_config


class Guessing(nn.Module):
    """Its control flow depends on its weights, as in a loop over the experts that were chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        hidden = self.layers[0](self.embed(input_ids))
        sys.stderr.write("a warning of the model's own\n")
        for row in (hidden > 0).nonzero():
            hidden = hidden + row[0]
        return hidden


def test_the_graph_of_a_failed_trace_is_not_printed(capfd):
    with pytest.raises(UnsupportedModelError, match=r"Guessing cannot be traced: .*data-dependent") as caught:
        export(Guessing(), "layers")
    # torch still hands the graph over, so that the test covers what it is for.
    assert "def forward" in caught.value.__cause__.partial_fx_graph
    assert str(caught.value).endswith("(at `for row in (hidden > 0).nonzero():` in Guessing)")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "a warning of the model's own\n")


@pytest.mark.slow
def test_a_configuration_that_refuses_another_depth_is_traced_whole():
    found = trace(small_config(CONFIG_MAPPING["prophetnet"]()))
    assert found.stands_for == {n: (n,) for n in range(found.model.config.num_decoder_layers)}


def test_experts_are_found_where_the_configuration_asks_for_their_balance():
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    plain, balanced = (
        discover_groups(CONFIG_MAPPING["mixtral"](**sizes, output_router_logits=asked)) for asked in (False, True)
    )
    assert [(g.name, g.kind, g.units) for g in balanced] == [(g.name, g.kind, g.units) for g in plain]
    assert "expert" in {g.kind for g in balanced}
