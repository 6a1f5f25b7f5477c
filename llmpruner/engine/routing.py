"""The calibration token and the router weight of each row of an expert's inputs.

transformers calls a module with stacked expert weights with the hidden states of all tokens (tokens, d_in), the
experts chosen for each token (tokens, k) and their router weights (tokens, k); it then computes one expert after the
other on the tokens routed to it. In such models, rows can be assigned to tokens; this is checked on the first product
of every expert.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .watch import WatchedProduct

if TYPE_CHECKING:
    from torch import nn


def all_tokens(product: WatchedProduct, samples: int, length: int) -> torch.Tensor | None:
    """The number of the token of each row, int64, of a product whose rows are all tokens of a micro-batch (samples,
    length); None for others, and for a model that puts time first, whose rows would be those of wrong samples."""
    rows = samples * length
    if len(product.inputs) == rows and product.leading_shape[0] in (1, samples, rows):
        return torch.arange(rows, device=product.inputs.device)
    return None


class Rows(NamedTuple):
    """What the rows of an expert's product are, one value for each: the number of the token, int64; the router weight,
    float32; and that weight divided by the sum over all experts chosen for the token, float32."""

    tokens: torch.Tensor
    gates: torch.Tensor
    shares: torch.Tensor


@dataclass
class _Call:
    """One call of a module of experts. ``rows``: expert → its `Rows`; None where its inputs are not the hidden states
    of the tokens routed to it."""

    hidden: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor
    rows: dict[int, Rows | None] = field(default_factory=dict)

    def rows_of(self, expert: int, inputs: torch.Tensor) -> Rows | None:
        if expert not in self.rows:
            # The order in which transformers gathers them: by rank of the expert among those chosen, then by token.
            rank, token = torch.where((self.chosen == expert).T)
            matches = len(token) == len(inputs) and torch.equal(inputs, self.hidden[token])
            self.rows[expert] = self._rows(token, rank) if matches else None
        return self.rows[expert]

    def _rows(self, token: torch.Tensor, rank: torch.Tensor) -> Rows:
        chosen = self.weights[token].float()
        gates, total = chosen.gather(1, rank[:, None])[:, 0], chosen.sum(1)
        return Rows(token, gates, torch.where(total == 0, 0.0, gates / total))


class Routing:
    """Records, while `following`, the calls of the modules that contain stacked parameters of ``names``.

    The attribute ``names`` lists all stacked parameters of these modules: `rows_of` must be called for every product
    with one of them.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        paths = {n.rpartition(".")[0] for n in names if model.get_parameter(n).dim() == 3}
        self._modules = {path: model.get_submodule(path) for path in sorted(paths)}
        self._calls: dict[str, _Call] = {}
        self.names = [
            f"{path}.{name}"
            for path, module in self._modules.items()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.dim() == 3
        ]

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for path, module in self._modules.items():
                hook = module.register_forward_pre_hook(self._hook(path), with_kwargs=True)
                stack.callback(hook.remove)
            yield
        self._calls.clear()

    @torch.no_grad()
    def rows_of(self, product: WatchedProduct) -> Rows | None:
        """The `Rows` of an expert's product; None where they are unknown. Must be called for every product with
        ``names``, in order."""
        call = self._calls.get(product.parameter.rpartition(".")[0])
        if call is None or product.slot is None:
            return None
        found = call.rows_of(product.slot, product.inputs)
        return found if found is not None and len(found.tokens) == len(product.inputs) else None

    def _hook(self, path: str) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls.pop(path, None)
            tensors = [t.detach() for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            floating = [t.flatten(0, -2) for t in tensors if t.dim() > 1 and t.is_floating_point()]
            chosen = [t.flatten(0, -2) for t in tensors if t.dim() > 1 and t.dtype in (torch.int64, torch.int32)]
            if floating and len(chosen) == 1:
                weights = [t for t in floating[1:] if t.shape == chosen[0].shape]
                if len(weights) == 1 and len(floating[0]) == len(chosen[0]):
                    self._calls[path] = _Call(floating[0], chosen[0], weights[0])

        return before
