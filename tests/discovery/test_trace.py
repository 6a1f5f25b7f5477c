"""Tracing a model, and following indices through the operators of its graph."""

import composed
import pytest
import torch
from criteria_cases import EXPERTS, SMALL
from torch import nn
from transformers import CONFIG_MAPPING

from llmpruner import Blocks
from llmpruner.discovery.groups import components, discover_graph, unit_sets
from llmpruner.discovery.propagate import RULES, Propagation
from llmpruner.discovery.trace import export, trace
from llmpruner.errors import UnsupportedModelError


class Guessing(nn.Module):
    """Its control flow depends on its weights."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, input_ids, use_cache):
        hidden = self.layers[0](self.embed(input_ids))
        return hidden if hidden.sum() > 0 else -hidden


def test_the_graph_of_a_failed_trace_is_not_printed(capfd):
    with pytest.raises(UnsupportedModelError, match=r"Guessing cannot be traced: .*data-dependent") as caught:
        export(Guessing(), "layers", {})
    assert str(caught.value).endswith("(at `return hidden if hidden.sum() > 0 else -hidden` in Guessing)")
    assert capfd.readouterr() == ("", "")


class Experts(nn.Module):
    """Experts in one matrix, of which those run that some token chose, each for the tokens that chose it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.ones(3 * 5, 8)), nn.Parameter(torch.ones(3 * 5, 8))

    def forward(self, hidden, chosen):
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
    def __init__(self):
        super().__init__()
        self.embed, self.router, self.head = nn.Embedding(16, 8), nn.Linear(8, 3), nn.Linear(8, 16)
        self.layers = nn.ModuleList([Experts()])

    def forward(self, input_ids, use_cache):
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
    plain, balanced = (
        discover_graph(CONFIG_MAPPING["mixtral"](**SMALL, **EXPERTS, output_router_logits=asked)).groups
        for asked in (False, True)
    )
    assert [(g.name, g.kind, g.units) for g in balanced] == [(g.name, g.kind, g.units) for g in plain]
    assert "expert" in {g.kind for g in balanced}


def test_a_model_is_traced_in_float32_whatever_it_is_stored_in():
    """XLNet keeps parameters in float32 in 16 bits, and cannot run so; in float32 it can."""
    config = CONFIG_MAPPING["xlnet"](vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=64, dtype="bfloat16")
    traced = trace(config)
    assert {parameter.dtype for parameter in traced.model.parameters()} == {torch.float32}
    assert config.dtype == torch.bfloat16


def test_rows_of_several_tables_are_blocked():
    run = Propagation(where="embedding in second")
    rows = run.new(3)
    run.look_up(rows)
    run.look_up(run.new(3))
    run.predict(rows)
    assert set(components(run).reasons.values()) == {"token ids are read by several tables (embedding in second)"}


class Odd(nn.Module):
    """Channels pass through an operator without a rule, or are summed over."""

    def __init__(self, odd):
        super().__init__()
        self.up, self.down, self.odd = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False), odd

    def forward(self, x):
        inner = self.up(x)
        return self.down(torch.special.bessel_j0(inner) if self.odd else inner * inner.sum(-1, keepdim=True))


@pytest.mark.parametrize(("odd", "reason"), [(True, "bessel_j0 is not understood"), (False, "reduced")])
def test_what_is_not_understood_is_blocked_with_a_reason(odd, reason):
    program = torch.export.export(Odd(odd), (torch.randn(2, 4),), strict=False)
    run = Propagation()
    run.run(program, {})
    found, reasons = unit_sets(run, "layers")
    assert not any(s.parameter == "up.weight" and s.axis == 0 for f in found for s in f.spans)
    assert reason in reasons["up.weight", 0]
    assert ("down.weight", 1) in reasons


def test_a_rule_that_does_not_fit_names_operator_and_module(monkeypatch):
    program = torch.export.export(Odd(True), (torch.randn(2, 4),), strict=False)
    monkeypatch.setitem(RULES, "linear", lambda run, node, x, *_: x)
    with pytest.raises(UnsupportedModelError, match=r"cannot follow operator linear in up: .*\(2, 6\).*rule \(2, 4\)"):
        Propagation().run(program, {})


class Assembled(nn.Module):
    """Keys put together in new memory, from heads and from what all heads share."""

    def __init__(self):
        super().__init__()
        self.heads, self.shared, self.out = nn.Linear(6, 12), nn.Linear(6, 2), nn.Linear(18, 6)

    def forward(self, x):
        own = self.heads(x).unflatten(-1, (3, 4))
        keys = own.new_empty(*own.shape[:-1], 6)
        keys[..., :4].copy_(own)
        keys[..., 4:].copy_(self.shared(x).unsqueeze(-2).expand(-1, -1, 3, -1))
        return self.out(keys.flatten(-2))


def test_heads_are_followed_through_new_memory():
    run = Propagation()
    run.run(torch.export.export(Assembled(), (torch.zeros(2, 5, 6),)), {})
    found, _ = unit_sets(run, "layers")
    (heads,) = [f for f in found if any(s.parameter == "out.weight" and s.axis == 1 for s in f.spans)]
    maps = {(s.parameter, s.axis): s.index for s in heads.spans}
    assert (maps["heads.weight", 0], maps["out.weight", 1]) == (Blocks(3, 4), Blocks(3, 6))
