"""Every product with a weight is seen, whatever it is written as, and told apart by axis and slot."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from llmpruner.engine.products import WatchProducts


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.square = nn.Parameter(torch.randn(5, 5, generator=generator))
        self.wide = nn.Parameter(torch.randn(7, 5, generator=generator))
        self.experts = nn.Parameter(torch.randn(3, 7, 5, generator=generator))
        self.bias = nn.Parameter(torch.randn(7, generator=generator))


WEIGHTS = Weights()
X = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
ROWS = X.flatten(0, 1)


def watch(module, compute):
    uses = []
    with torch.no_grad(), WatchProducts(module, [n for n, _ in module.named_parameters()], uses.append):
        compute(module)
    return uses


PRODUCTS = {
    "linear": lambda m: functional.linear(X, m.wide),
    "linear by keyword": lambda m: functional.linear(X, weight=m.wide),
    "operator": lambda m: X @ m.wide.T,
    "matmul": lambda m: torch.matmul(X, m.wide.T),
    "method": lambda m: X.matmul(m.wide.transpose(0, 1)),
    "mm": lambda m: torch.mm(ROWS, m.wide.T),
    "view": lambda m: functional.linear(X, m.wide[:]),
}


@pytest.mark.parametrize("how", PRODUCTS)
def test_a_matrix_is_seen_however_the_product_is_written(how):
    (use,) = watch(WEIGHTS, PRODUCTS[how])
    assert (use.parameter, use.axis, use.slot, use.bias) == ("wide", 1, None, None)
    torch.testing.assert_close(use.inputs, ROWS)
    torch.testing.assert_close(use.outputs, ROWS @ WEIGHTS.wide.detach().T)


def test_the_axis_of_a_square_matrix_is_told_by_its_strides():
    assert [use.axis for use in watch(WEIGHTS, lambda m: (X @ m.square, X @ m.square.T))] == [0, 1]


def test_the_bias_is_what_the_product_adds():
    (linear,) = watch(WEIGHTS, lambda m: functional.linear(X, m.wide, m.bias))
    (keyword,) = watch(WEIGHTS, lambda m: functional.linear(X, m.wide, bias=m.bias))
    (added,) = watch(WEIGHTS, lambda m: torch.addmm(m.bias, ROWS, m.wide.T))
    for use in (linear, keyword, added):
        assert use.bias is WEIGHTS.bias
        torch.testing.assert_close(use.outputs, ROWS @ WEIGHTS.wide.detach().T + WEIGHTS.bias.detach())


STACK = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2))
SLOTS = {
    "one expert, and another": (lambda m: (functional.linear(ROWS, m.experts[2]), ROWS @ m.experts[1].T), [2, 1]),
    "a batch of experts": (lambda m: torch.bmm(STACK, m.experts.mT), [0, 1, 2]),
    "some experts of a stack": (lambda m: torch.bmm(X, m.experts[1:].mT), [1, 2]),
    "inputs that all experts share": (lambda m: torch.matmul(ROWS, m.experts.mT), [0, 1, 2]),
}


@pytest.mark.parametrize("how", SLOTS)
def test_every_expert_is_a_slot(how):
    compute, slots = SLOTS[how]
    uses = watch(WEIGHTS, compute)
    assert [(use.parameter, use.axis, use.slot) for use in uses] == [("experts", 2, slot) for slot in slots]
    for use in uses:
        torch.testing.assert_close(use.outputs, use.inputs @ WEIGHTS.experts[use.slot].detach().T)


UNUSED = {
    # Which expert multiplies which rows cannot be told from the shapes.
    "inputs of more axes than the stack": lambda m: torch.matmul(X[:, None].expand(2, 3, 4, 5), m.experts.mT),
    # Its columns would be taken for the first ones of the whole matrix.
    "part of the inputs": lambda m: functional.linear(X[..., :3], m.wide[:, :3]),
    "a matrix viewed as a stack": lambda m: torch.bmm(X[:1], m.square.view(1, 5, 5)),
}


@pytest.mark.parametrize("what", UNUSED)
def test_what_cannot_be_told_is_no_use(what):
    assert watch(WEIGHTS, UNUSED[what]) == []


@pytest.mark.parametrize("how", ["matrix", "stack"])
def test_a_copy_stays_as_it_was_when_the_model_overwrites_its_tensors(how):
    inputs, before = X.clone(), X.clone()
    uses = []
    with torch.no_grad(), WatchProducts(WEIGHTS, ["wide", "experts"], lambda use: uses.append(use.copied())):
        result = functional.linear(inputs, WEIGHTS.wide) if how == "matrix" else inputs @ WEIGHTS.experts[:2].mT
        wanted = result.clone()
        result += 1
        inputs.mul_(2)
    for part, use in enumerate(uses):
        of = slice(None) if how == "matrix" else part
        assert torch.equal(use.inputs, before[of].flatten(0, -2))
        assert torch.equal(use.outputs, wanted[of].flatten(0, -2))


def test_parameters_in_one_storage_are_told_apart():
    """A checkpoint may be mapped into memory as a whole."""
    module = nn.Module()
    flat = torch.arange(40.0)
    module.first, module.second = nn.Parameter(flat[:20].view(4, 5)), nn.Parameter(flat[20:].view(4, 5))
    uses = watch(module, lambda m: (functional.linear(X, m.first), functional.linear(X, m.second)))
    assert [use.parameter for use in uses] == ["first", "second"]
