"""Every matrix product with given weights, and sums of what a criterion computes from each.

Linear layers, transposed ones (GPT-2), and slices of a stacked expert parameter all call one of a few functions of
torch, which are intercepted: names and classes of modules do not matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..errors import PluginError
from ..models.devices import multiplies_bfloat16_fast, of_sums
from .ranks import Ranks
from .signals import Product, ProductStats

_PRODUCTS: dict[Any, tuple[tuple[int, str], ...]] = {
    functional.linear: ((0, "input"), (1, "weight"), (2, "bias")),
    torch.matmul: ((0, "input"), (1, "other")),
    torch.Tensor.matmul: ((0, "self"), (1, "other")),
    torch.Tensor.__matmul__: ((0, "self"), (1, "other")),
    torch.mm: ((0, "input"), (1, "mat2")),
    torch.Tensor.mm: ((0, "self"), (1, "mat2")),
    torch.bmm: ((0, "input"), (1, "mat2")),
    torch.Tensor.bmm: ((0, "self"), (1, "mat2")),
    torch.addmm: ((1, "mat1"), (2, "mat2"), (0, "input")),
    torch.baddbmm: ((1, "batch1"), (2, "batch2")),
}
"""Function → position and name of the arguments for the inputs, the weight, and for what is added."""


@dataclass(frozen=True)
class WatchedProduct:
    """One product with a weight matrix. ``inputs`` (rows, d_in) and ``outputs`` (rows, d_out), bias included, are the
    model's tensors, detached. Later operators may overwrite them (in Falcon), so keep what `copied` returns."""

    parameter: str
    axis: int
    """The axis of the parameter that is summed over: 1 of a linear weight, 0 of a transposed one."""
    slot: int | None
    """Number of the matrix in a stacked parameter (the expert); None where the parameter is one matrix."""
    inputs: torch.Tensor
    outputs: torch.Tensor
    bias: torch.Tensor | None
    """The bias that the product itself adds, (d_out,)."""
    result: torch.Tensor
    """The function's result with its autograd graph: the outputs in their original shape, or those of a whole stack."""
    part: int | None
    """Index of ``outputs`` in ``result``; None for all of it."""

    def copied(self) -> WatchedProduct:
        """The product with inputs and outputs of its own, without an autograd graph."""
        inputs, outputs = (t.clone(memory_format=torch.contiguous_format) for t in (self.inputs, self.outputs))
        return replace(self, inputs=inputs, outputs=outputs, result=outputs, part=None)

    def on_gradient(self, call: Callable[[torch.Tensor], None]) -> None:
        """Call ``call`` with the gradient with respect to ``outputs``, (rows, d_out), when backward computes it."""
        # The graph of ``result`` refers to the hook. Neither would be freed if the hook referred to ``result``, as
        # ``self`` does; ``call`` must not either.
        part = self.part
        self.result.register_hook(lambda grad: call(_rows(grad if part is None else grad[part])))  # type: ignore[no-untyped-call]


class WatchProducts(TorchFunctionMode):
    """While active, calls ``seen`` for every product with one of the parameters ``names``, but for those that ``seen``
    computes. They are matched by storage, so that views are found too: a slice, a transpose, one expert of a stack."""

    def __init__(self, model: nn.Module, names: Iterable[str], seen: Callable[[WatchedProduct], object]) -> None:
        super().__init__()
        self._seen = seen
        self._by_storage: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name in names:
            parameter = model.get_parameter(name)
            self._by_storage.setdefault(parameter.untyped_storage().data_ptr(), []).append((name, parameter))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _PRODUCTS:
            values: list[Any] = [args[at] if len(args) > at else kwargs.get(name) for at, name in _PRODUCTS[func]]
            inputs, weight, *added = values
            bias = added[0] if added and added[0] is not None and added[0].dim() == 1 else None
            summed = weight.dim() - (1 if func is functional.linear else 2)
            for product in self._products(weight, summed, inputs, result, bias):
                self._seen(product)
        return result

    def _products(
        self, weight: torch.Tensor, summed: int, inputs: torch.Tensor, result: torch.Tensor, bias: torch.Tensor | None
    ) -> Iterator[WatchedProduct]:
        """The products of a call with each matrix of ``weight``, a view of a parameter; ``summed``: its input axis."""
        sharing = self._by_storage.get(weight.untyped_storage().data_ptr(), ())
        place = weight.storage_offset()
        viewed = next(((n, p) for n, p in sharing if 0 <= place - p.storage_offset() < p.numel()), None)
        if viewed is None or weight.dim() not in (2, viewed[1].dim()):
            return
        name, parameter = viewed
        # The view may be a transpose: its stride determines which axis of the parameter is summed over.
        like = weight.stride(summed), weight.shape[summed]
        axes = [a for a in range(parameter.dim()) if (parameter.stride(a), parameter.shape[a]) == like]
        if not axes:
            return
        axis, first = axes[-1], int((place - parameter.storage_offset()) // parameter.stride(0))
        if weight.dim() == 2:
            slot = first if parameter.dim() == 3 else None
            yield WatchedProduct(name, axis, slot, _rows(inputs), _rows(result), bias, result, None)
        elif weight.dim() == 3 and inputs.dim() <= 3:
            # The same inputs may be multiplied with every matrix of the stack.
            inputs = inputs.expand(len(weight), *inputs.shape[-2:])
            for n in range(len(weight)):
                yield WatchedProduct(name, axis, first + n, _rows(inputs[n]), _rows(result[n]), None, result, n)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().flatten(0, -2) if tensor.dim() > 1 else tensor.detach()[None]


Gates = tuple[torch.Tensor, torch.Tensor]
"""Of each row of an expert's product: the router weight, and its share of the token's router weights; float32."""


class Routing:
    """The router weights of the rows of experts' products, while `following`; call `gates_of` for each of ``names``.

    transformers calls a module of experts with the hidden states of all tokens (tokens, d_in), the experts chosen for
    each (tokens, k) and their router weights (tokens, k), and computes one expert after the other on its tokens.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        paths = {n.rpartition(".")[0] for n in names if model.get_parameter(n).dim() == 3}
        self._modules = {path: model.get_submodule(path) for path in sorted(paths)}
        # Module → hidden states, experts chosen, their weights, and the gates of each expert after its first product.
        self._calls: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[int, Gates | None]]] = {}
        owned = ((path, *each) for path, m in self._modules.items() for each in m.named_parameters(recurse=False))
        self.names = [f"{path}.{name}" for path, name, parameter in owned if parameter.dim() == 3]

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        with contextlib.ExitStack() as hooks:
            for path, module in self._modules.items():
                hooks.enter_context(module.register_forward_pre_hook(partial(self._note, path), with_kwargs=True))
            yield
        self._calls.clear()

    @torch.no_grad()
    def gates_of(self, product: WatchedProduct) -> Gates | None:
        """Of an expert's product; None where its inputs are not those of the tokens routed to it."""
        call = self._calls.get(product.parameter.rpartition(".")[0])
        if call is None or product.slot is None:
            return None
        hidden, chosen, weights, known = call
        if product.slot not in known:
            # The order in which transformers gathers them: by rank of the expert among those chosen, then by token.
            rank, token = torch.where((chosen == product.slot).T)
            known[product.slot] = None
            if len(token) == len(product.inputs) and torch.equal(product.inputs, hidden[token]):
                of_token = weights[token].float()
                weight, total = of_token.gather(1, rank[:, None])[:, 0], of_token.sum(1)
                known[product.slot] = weight, torch.where(total == 0, 0.0, weight / total)
        gates = known[product.slot]
        return gates if gates is not None and len(gates[0]) == len(product.inputs) else None

    def _note(self, path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The call of a module, where its arguments are those of transformers."""
        self._calls.pop(path, None)
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.dim() > 1]
        tensors = [t.detach().flatten(0, -2) for t in tensors]
        floating = [t for t in tensors if t.is_floating_point()]
        chosen = [t for t in tensors if t.dtype in (torch.int64, torch.int32)]
        if floating and len(chosen) == 1:
            weights = [t for t in floating[1:] if t.shape == chosen[0].shape]
            if len(weights) == 1 and len(floating[0]) == len(chosen[0]):
                self._calls[path] = floating[0], chosen[0], weights[0], {}


Measure = Callable[[Product], Mapping[str, torch.Tensor]]


@dataclass(eq=False)
class ReduceProducts:
    """Sums of the results of ``measure`` over all products with the weights ``names`` of one layer."""

    model: PreTrainedModel
    names: Collection[str]
    reads: Mapping[str, frozenset[str]]
    measure: Measure
    num_samples: int
    gradients: bool = False
    """Whether ``measure`` is called in the backward pass, with the gradient of the outputs, not in the forward pass."""

    def __post_init__(self) -> None:
        self._routing = Routing(self.model, self.names)
        self._sums: dict[str, dict[str, torch.Tensor]] = {}
        self._axes: dict[str, int] = {}

    @contextlib.contextmanager
    def watching(self, loss_scale: float = 1.0) -> Iterator[None]:
        """While active, watch one micro-batch. Gradients times ``loss_scale`` are of the mean loss of each sample."""
        watched = [*self.names, *self._routing.names]
        with self._routing.following(), WatchProducts(self.model, watched, partial(self._add, loss_scale)):
            yield

    def statistics(self, ranks: Ranks) -> dict[str, ProductStats]:
        """Parameter → sums, for every weight for which ``measure`` returned values. Called by all ``ranks``."""
        axes = ranks.merged(self._axes)
        shapes = ranks.merged({(name, of): t.shape for name, sums in self._sums.items() for of, t in sums.items()})
        # In one order, so that the processes add the same sums to one another.
        totals: dict[str, dict[str, torch.Tensor]] = {name: {} for name in axes}
        for (name, of), shape in shapes.items():
            device, total = self.model.get_parameter(name).device, self._sums.get(name, {}).get(of)
            zeros = torch.zeros(shape, dtype=torch.float64, device=of_sums(device))
            totals[name][of] = zeros if total is None else total
        ranks.sum_(tensor for sums in totals.values() for tensor in sums.values())
        return {name: ProductStats(sums, axes[name]) for name, sums in totals.items()}

    def _add(self, loss_scale: float, watched: WatchedProduct) -> None:
        gates, shares = self._routing.gates_of(watched) or (None, None)
        no_gradient = self.gradients and not watched.result.requires_grad  # indexers of DeepSeek-V3.2 choose tokens
        if watched.parameter not in self.names or no_gradient:
            return
        parameter = self.model.get_parameter(watched.parameter).detach()
        matrix = parameter if watched.slot is None else parameter[watched.slot]
        weight = matrix if watched.axis == parameter.dim() - 1 else matrix.mT
        if watched.outputs.shape[1] != len(weight):
            return  # a product with some rows of the weight (DBRX)
        # A later operation may overwrite a tensor before the backward pass reads it.
        inputs, outputs = (t.to(torch.float32, copy=self.gradients) for t in (watched.inputs, watched.outputs))
        # transformers stores the biases of experts as NAME_bias (experts, d_out), and adds them separately.
        path, _, leaf = watched.parameter.rpartition(".")
        biases = getattr(self.model.get_submodule(path), f"{leaf}_bias", None)
        if watched.slot is not None and isinstance(biases, torch.Tensor):
            outputs = outputs + biases[watched.slot].detach().float()
        product = Product(
            inputs=inputs,
            outputs=outputs,
            weight=weight,
            reads=self.reads[watched.parameter],
            expert=watched.slot,
            num_samples=self.num_samples,
            row_gates=gates,
            row_gate_shares=shares,
            in_bfloat16=watched.outputs.dtype == torch.bfloat16 and multiplies_bfloat16_fast(outputs.device.type),
        )
        add = partial(self._sum, watched.parameter, watched.axis, watched.slot)
        if self.gradients:
            watched.on_gradient(lambda grad: add(replace(product, output_grads=grad.float() * loss_scale)))
        else:
            add(product)

    @torch.no_grad()
    def _sum(self, parameter: str, axis: int, slot: int | None, product: Product) -> None:
        self._axes[parameter] = axis
        sums = self._sums.setdefault(parameter, {})
        # The layer may run under autocast, where products would be in bfloat16.
        with torch.autocast(product.inputs.device.type, enabled=False):
            measured = self.measure(product)
        for name, value in measured.items():
            if name not in sums:
                stack = () if slot is None else (self.model.get_parameter(parameter).shape[0],)
                sums[name] = torch.zeros((*stack, *value.shape), dtype=torch.float64, device=of_sums(value.device))
            total = sums[name] if slot is None else sums[name][slot]
            if total.shape != value.shape:
                raise PluginError(
                    f"measure returns '{name}' of shape {tuple(value.shape)} for one product with a weight and of "
                    f"shape {tuple(total.shape)} for another; sums of one name must have one shape"
                )
            total += value.to(total.device)
