"""A trace that fails raises an error with the reason, and prints nothing."""

from __future__ import annotations

import composed
import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from llmpruner.discovery.groups import discover_graph, unit_sets
from llmpruner.discovery.propagate import Propagation
from llmpruner.discovery.trace import export, trace
from llmpruner.errors import UnsupportedModelError


class Guessing(nn.Module):
    """Its control flow depends on its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        hidden = self.layers[0](self.embed(input_ids))
        return hidden if hidden.sum() > 0 else -hidden


def test_the_graph_of_a_failed_trace_is_not_printed(capfd):
    with pytest.raises(UnsupportedModelError, match=r"Guessing cannot be traced: .*data-dependent") as caught:
        export(Guessing(), "layers", {})
    # torch still hands the graph over, so that the test covers what it is for.
    assert "def forward" in caught.value.__cause__.partial_fx_graph
    assert str(caught.value).endswith("(at `return hidden if hidden.sum() > 0 else -hidden` in Guessing)")
    assert capfd.readouterr() == ("", "")


class Experts(nn.Module):
    """Experts in one matrix, of which those run that some token chose, each for the tokens that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.ones(3 * 5, 8)), nn.Parameter(torch.ones(3 * 5, 8))

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        # One class more than there are experts, as in DBRX.
        mask = nn.functional.one_hot(chosen, 4).permute(2, 1, 0)
        result = torch.zeros_like(hidden)
        for expert in (mask.sum((1, 2)) > 0).nonzero():
            number = expert[0]
            _, tokens = torch.where(mask[number])
            up, down = (matrix.view(3, 5, 8)[number] for matrix in (self.up, self.down))
            result.index_add_(0, tokens, torch.relu(hidden[tokens] @ up.T) @ down)
        return result


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router, self.head = nn.Embedding(16, 8), nn.Linear(8, 3), nn.Linear(8, 16)
        self.layers = nn.ModuleList([Experts()])

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        hidden = self.embed(input_ids).reshape(-1, 8)
        return self.head(self.layers[0](hidden, self.router(hidden).topk(2, -1).indices))


def test_a_loop_over_experts_is_traced_for_all_of_them():
    traced = export(Loop(), "layers", {})
    run = Propagation()
    run.run(traced.program, {})
    usable, reasons = unit_sets(run, "layers")
    (found,) = (units for units in usable if units.spans[0].parameter == "layers.0.up")
    assert [str(s) for s in found.spans] == [
        f"layers.0.{name}[axis 0] {rows} ({role})"
        for name, role in (("up", "produces"), ("down", "consumes"))
        for rows in ("0:5", "5:10", "10:15")
    ]
    assert reasons["router.weight", 0].startswith("numbered otherwise"), "experts are picked by number"
    assert traced.stay == "", "the layer ran in two exports, and once in each"


class Placed(composed.Layer):
    """Reads one of as many numbers as there are layers."""

    def __init__(self, config, number):
        super().__init__(config, number)
        self.config, self.place = config, number

    def forward(self, x):
        return super().forward(x) * [1.0 for _ in range(self.config.num_hidden_layers)][self.place]


def test_a_model_that_does_not_run_with_fewer_layers_is_traced_whole(monkeypatch):
    config = composed.ComposedConfig(num_hidden_layers=4, linear=(3,))
    assert trace(config).stands_for == {0: (0, 1, 2), 1: (3,)}
    monkeypatch.setattr(composed, "Layer", Placed)
    assert trace(config).stands_for == {n: (n,) for n in range(4)}


def test_experts_are_found_where_the_configuration_asks_for_their_balance():
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    plain, balanced = (
        discover_graph(CONFIG_MAPPING["mixtral"](**sizes, output_router_logits=asked)).groups for asked in (False, True)
    )
    assert [(g.name, g.kind, g.units) for g in balanced] == [(g.name, g.kind, g.units) for g in plain]
    assert "expert" in {g.kind for g in balanced}


def test_a_model_is_traced_in_float32_whatever_it_is_stored_in():
    """XLNet keeps parameters in float32 in 16 bits, and cannot run so; in float32 it can."""
    config = CONFIG_MAPPING["xlnet"](vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=64, dtype="bfloat16")
    traced = trace(config)
    assert {parameter.dtype for parameter in traced.model.parameters()} == {torch.float32}
    assert config.dtype == torch.bfloat16
