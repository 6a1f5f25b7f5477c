"""Index arithmetic by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llmpruner.discovery.ids import connected_components
from llmpruner.discovery.propagate import RULES, Propagation
from llmpruner.discovery.units import unit_sets
from llmpruner.errors import UnsupportedModelError


def test_components_of_a_random_graph_agree_with_a_search() -> None:
    random = np.random.default_rng(0)
    left, right = random.integers(0, 400, 300), random.integers(0, 400, 300)
    label = connected_components(400, [(left[:150], right[:150]), (left[150:], right[150:])])
    neighbours: dict[int, set[int]] = {n: {n} for n in range(400)}
    for a, b in zip(left.tolist(), right.tolist(), strict=True):
        neighbours[a].add(b)
        neighbours[b].add(a)
    for start in range(400):
        seen, queue = {start}, [start]
        while queue:
            new = neighbours[queue.pop()] - seen
            seen |= new
            queue += new
        assert label[start] == min(seen)


def test_rows_of_several_tables_are_blocked() -> None:
    run = Propagation(where="embedding in second")
    rows = run.ids.new(3)
    run.look_up(rows)
    run.look_up(run.ids.new(3))
    run.predict(rows)
    assert set(run.ids.components().reasons.values()) == {"token ids are read by several tables (embedding in second)"}


class Odd(nn.Module):
    """Channels pass through an operator without a rule, or are summed over."""

    def __init__(self, odd: bool) -> None:
        super().__init__()
        self.up, self.down, self.odd = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False), odd

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.up(x)
        return self.down(torch.special.bessel_j0(inner) if self.odd else inner * inner.sum(-1, keepdim=True))


@pytest.mark.parametrize(("odd", "reason"), [(True, "bessel_j0 is not understood"), (False, "reduced")])
def test_what_is_not_understood_is_blocked_with_a_reason(odd: bool, reason: str) -> None:
    program = torch.export.export(Odd(odd), (torch.randn(2, 4),), strict=False)
    run = Propagation()
    run.run(program, {})
    found, reasons = unit_sets(run)
    assert not any(s.parameter == "up.weight" and s.axis == 0 for f in found for s in f.owned)
    assert reason in reasons["up.weight", 0]
    assert ("down.weight", 1) in reasons


def fails(*_: Any) -> Any:
    raise IndexError("no such axis")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (fails, "IndexError: no such axis"),
        (lambda run, node, x, *_: x, r"shape \(2, 6\), and the rule \(2, 4\)"),
    ],
)
def test_a_rule_that_does_not_fit_names_operator_and_module(
    rule: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = torch.export.export(Odd(True), (torch.randn(2, 4),), strict=False)
    monkeypatch.setitem(RULES, "linear", rule)
    with pytest.raises(UnsupportedModelError, match=f"^discovery cannot follow operator linear in up: .*{message}"):
        Propagation().run(program, {})


class Assembled(nn.Module):
    """Keys put together in new memory, from heads and from what all heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.shared, self.out = nn.Linear(6, 12), nn.Linear(6, 2), nn.Linear(18, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = self.heads(x).unflatten(-1, (3, 4))
        keys = own.new_empty(*own.shape[:-1], 6)
        keys[..., :4].copy_(own)
        keys[..., 4:].copy_(self.shared(x).unsqueeze(-2).expand(-1, -1, 3, -1))
        return self.out(keys.flatten(-2))


class Turned(nn.Module):
    """Heads rotated as complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.out = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(self.heads(x).reshape(*x.shape[:-1], 3, 2, 2))
        angles = torch.arange(2.0)
        turned = pairs * torch.polar(torch.ones_like(angles), angles)
        return self.out(torch.view_as_real(turned).flatten(2))


@pytest.mark.parametrize(("model", "consumed"), [(Assembled(), 6), (Turned(), 4)], ids=["assembled", "turned"])
def test_heads_are_followed_through_new_memory_and_complex_numbers(model: nn.Module, consumed: int) -> None:
    run = Propagation()
    run.run(torch.export.export(model, (torch.zeros(2, 5, 6),)), {})
    (heads,) = [f for f in unit_sets(run)[0] if any(s.parameter == "out.weight" and s.axis == 1 for s in f.owned)]
    rows = {(s.parameter, s.axis): s.rows.tolist() for s in heads.owned}
    assert rows["heads.weight", 0] == [list(range(u * 4, u * 4 + 4)) for u in range(3)]
    assert rows["out.weight", 1] == [list(range(u * consumed, (u + 1) * consumed)) for u in range(3)]
