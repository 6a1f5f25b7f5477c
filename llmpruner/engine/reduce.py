"""Sums of statistics that a criterion computes from each matrix product.

Activations are kept for one micro-batch only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..errors import PluginError
from ..models.numbers import multiplies_bfloat16_fast
from .position import Position
from .ranks import SINGLE, Ranks
from .routing import Routing, all_tokens
from .signals import Product, ProductStats
from .watch import WatchedProduct, WatchProducts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Measure = Callable[[Product], Mapping[str, torch.Tensor]]


class ReduceProducts:
    """Sums of the results of ``measure`` over all products with the weights ``names`` of one layer.

    ``positions``: of at least these weights. ``num_samples``: of the calibration set. ``gradients``: whether
    ``measure`` is called in the backward pass, with the gradient of the outputs, instead of the forward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        names: Collection[str],
        positions: Mapping[str, Position],
        measure: Measure,
        num_samples: int,
        *,
        gradients: bool = False,
    ) -> None:
        self._model, self._names, self._positions, self._measure = model, names, positions, measure
        self._num_samples, self._gradients = num_samples, gradients
        self._routing = Routing(model, names)
        self._first, self._shape = 0, (0, 0)
        self._sums: dict[str, dict[str, torch.Tensor]] = {}
        self._axes: dict[str, int] = {}

    @contextlib.contextmanager
    def following(self, watch: WatchProducts) -> Iterator[None]:
        """While active, takes the products that ``watch`` observes."""
        watch.add(self._routing.names, self._routing.rows_of)
        watch.add(self._names, self._add)
        with self._routing.following():
            yield

    def next_batch(self, first: int, ids: torch.Tensor, scale: float = 1.0) -> None:
        """Set the next micro-batch. ``ids``: token ids (samples, length); ``first``: number of its first sample;
        ``scale``: by which its loss is multiplied before the backward pass."""
        self._first, self._shape, self._scale = first, (ids.shape[0], ids.shape[1]), scale

    def statistics(self, ranks: Ranks = SINGLE) -> dict[str, ProductStats]:
        """Parameter → sums, for every weight for which ``measure`` returned values. ``ranks``: the processes that
        observed products; all must call this."""
        self._axes = ranks.merged(self._axes)
        own = {(name, of): tensor.shape for name, sums in self._sums.items() for of, tensor in sums.items()}
        shapes = ranks.merged(own)
        for (name, of), shape in shapes.items():
            if own.get((name, of), shape) != shape:
                raise _shapes_differ(of, own[name, of], shape)
        # In one order, so that the processes add the same sums to one another.
        self._sums = {
            name: {
                of: self._sums[name][of] if (name, of) in own else self._zeros(name, shape)
                for (owner, of), shape in shapes.items()
                if owner == name
            }
            for name in self._axes
        }
        ranks.sum_(tensor for sums in self._sums.values() for tensor in sums.values())
        return {name: ProductStats(sums, self._axes[name]) for name, sums in self._sums.items()}

    def _add(self, watched: WatchedProduct) -> None:
        parameter = self._model.get_parameter(watched.parameter).detach()
        matrix = parameter if watched.slot is None else parameter[watched.slot]
        rows = None if watched.slot is None else self._routing.rows_of(watched)
        tokens = all_tokens(watched, *self._shape) if rows is None else rows.tokens
        outputs = watched.outputs
        # A later operation may overwrite a tensor before the backward pass reads it.
        copy = self._gradients
        product = Product(
            inputs=watched.inputs.to(torch.float32, copy=copy),
            outputs=self._with_bias(watched, outputs.to(torch.float32, copy=copy)),
            weight=matrix if watched.axis == parameter.dim() - 1 else matrix.mT,
            position=self._positions[watched.parameter],
            expert=watched.slot,
            num_samples=self._num_samples,
            row_samples=None if tokens is None else self._first + tokens // self._shape[1],
            row_gates=None if rows is None else rows.gates,
            row_gate_shares=None if rows is None else rows.shares,
            in_bfloat16=outputs.dtype == torch.bfloat16 and multiplies_bfloat16_fast(outputs.device.type),
        )
        # The hook must not refer to the graph, which refers to the hook: neither would be freed.
        parameter_name, axis, slot = watched.parameter, watched.axis, watched.slot
        samples = self._shape[0] / self._scale

        def measure(grad: torch.Tensor) -> None:
            # The gradient is that of the mean loss over the samples of the micro-batch, scaled.
            self._sum(parameter_name, axis, slot, replace(product, output_grads=grad.float() * samples))

        if self._gradients:
            watched.on_gradient(measure)
        else:
            self._sum(parameter_name, axis, slot, product)

    def _with_bias(self, watched: WatchedProduct, outputs: torch.Tensor) -> torch.Tensor:
        """``outputs`` with the bias of an expert, which transformers stores as ``NAME_bias`` (experts, d_out) and adds
        separately."""
        path, _, leaf = watched.parameter.rpartition(".")
        bias = getattr(self._model.get_submodule(path), f"{leaf}_bias", None)
        if watched.slot is None or not isinstance(bias, torch.Tensor):
            return outputs
        return outputs + bias[watched.slot].detach().float()

    @torch.no_grad()
    def _sum(self, parameter: str, axis: int, slot: int | None, product: Product) -> None:
        self._axes[parameter] = axis
        sums = self._sums.setdefault(parameter, {})
        for name, value in self._measure(product).items():
            if name not in sums:
                stack = () if slot is None else (self._model.get_parameter(parameter).shape[0],)
                sums[name] = torch.zeros((*stack, *value.shape), dtype=torch.float64, device=value.device)
            total = sums[name] if slot is None else sums[name][slot]
            if total.shape != value.shape:
                raise _shapes_differ(name, value.shape, total.shape)
            total += value

    def _zeros(self, parameter: str, shape: torch.Size) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self._model.get_parameter(parameter).device)


def _shapes_differ(name: str, shape: torch.Size, other: torch.Size) -> PluginError:
    return PluginError(
        f"measure returns '{name}' of shape {tuple(shape)} for one product with a weight and of shape {tuple(other)} "
        "for another; sums of one name must have one shape"
    )
