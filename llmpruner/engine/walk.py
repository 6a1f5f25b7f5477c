"""Running the decoder forwards, one layer at a time, over a calibration set.

The caller keeps the hidden states, and may pass those of the dense and of the pruned model through a layer. The other
arguments of each layer (masks, rotary tables) are recorded once, by running the model with layers that return their
inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ModelError
from ..models.numbers import autocast_to, computes_bfloat16_fast
from ..models.positions import logits_at
from .boundaries import States, copied
from .calls import (
    Batch,
    call_layer,
    eager_experts,
    expert_configs,
    first_output,
    hidden_of,
    passes_on,
    record,
    replaced_layers,
    with_passed,
)
from .check import LayerCheck
from .execution import Execution

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel

    from ..calibration.calibration import CalibrationSet
    from .ranks import Ranks


@dataclass
class ForwardWalk:
    """The decoder layers of a model, and a calibration set in micro-batches to run through them.

    With several processes, ``batches`` and all hidden states are those of this one (`Ranks.mine`): maybe none, but the
    first process has the first.
    """

    execution: Execution
    layers: nn.ModuleList
    batches: list[Batch]
    embedded: States
    """Hidden states before the first layer, (samples, length, hidden size) in float32, one tensor for each
    micro-batch."""
    products: torch.dtype
    """The dtype of matrix products; hidden states are in float32, unless they are in 16 bits in layers, see `narrow`.
    """
    experts: list[PreTrainedConfig]
    """Configurations that select the implementation of experts."""
    tokens: int
    """In the calibration set, of all processes."""
    tuples: list[int | None] = field(default_factory=list)
    """How many further values each layer returns, see `record`."""
    narrow: bool = False
    """Whether layers of a model in 16 bits refuse hidden states in float32, and get them in the model's dtype."""

    @property
    def ranks(self) -> Ranks:
        return self.execution.ranks

    @classmethod
    @torch.no_grad()
    def over(cls, execution: Execution, calibration: CalibrationSet) -> ForwardWalk:
        """Embed the calibration set. Raises `UnsupportedModelError` for a decoder whose layers pass on other values
        than hidden states, and `ModelError` for hidden states that are not finite."""
        ids = calibration.input_ids
        return cls.over_batches(execution, torch.split(ids, execution.rows_forward(ids.shape[1])))

    @classmethod
    @torch.no_grad()
    def over_batches(cls, execution: Execution, batches: Sequence[torch.Tensor]) -> ForwardWalk:
        """`over` for token ids in micro-batches (samples, length), int64, which may have different lengths."""
        model, layers = execution.model, execution.layers
        with execution.weights.outside():
            ids = [check_tokens(model, batch) for batch in batches]
            products = torch.bfloat16 if computes_bfloat16_fast(model) else model.dtype
            states, experts = execution.boundaries().states(), expert_configs(model)
            tokens = sum(map(torch.numel, ids))
            return cls(execution, layers, [], states, products, experts, tokens)._embed(ids)

    def _embed(self, ids: Sequence[torch.Tensor]) -> ForwardWalk:
        model, layers = self.execution.model, self.layers
        firsts = accumulate((len(batch) for batch in ids[:-1]), initial=0)
        shapes: dict[torch.Size, Batch] = {}
        with eager_experts(self.experts):
            # In the model's own precision.
            check = LayerCheck(model, layers, ids[0])
            for number in range(len(layers)):
                with self.layer(number):
                    check.layer(number)
                    if self.products == torch.float32 or self.narrow or check.runs_in(self.products, number):
                        continue
                    self.narrow = self.products == model.dtype
                    self.products = model.dtype
            self.tuples = tuples = check.tuples
            for first, part in self.ranks.mine(list(zip(firsts, ids, strict=True))):
                batch, hidden = record(model, layers, part, tuples, first)
                # As a rule they depend on the shape alone, and a long text has many micro-batches.
                like = shapes.setdefault(part.shape, batch)
                if _same(like.calls, batch.calls):
                    batch.calls = like.calls
                self.batches.append(batch)
                self.embedded.append(hidden.float())
        return self

    def states(self) -> States:
        """An empty sequence for hidden states, beside the others of this walk."""
        return self.embedded.beside()

    def restored(self, file: Path) -> States:
        """Hidden states that `States.dump` wrote in a walk over the same calibration set."""
        found = self.states()
        if len(self.embedded):
            shapes, first = [hidden.shape for hidden in self.embedded], self.embedded[0]
            found.load(file, shapes, first.dtype, first.device)
        return found

    def layer(self, number: int) -> contextlib.AbstractContextManager[None]:
        """While active, the weights of a layer are in memory."""
        return self.execution.weights.layer(number)

    def advance(self, number: int, states: States) -> None:
        """Replace hidden states before layer ``number`` by those after it."""
        for position, batch in enumerate(self.batches):
            states[position] = self.run(number, batch, states[position], states.passed)

    def run(
        self, number: int, batch: Batch, hidden: torch.Tensor, passed: dict[int, dict[str, Any]], *, tried: bool = False
    ) -> torch.Tensor:
        """Hidden states (samples, length, hidden size) after layer ``number``, in float32. ``passed``: of the `States`
        that ``hidden`` is one of. ``tried``: leave it as it is, as the layer will run again."""
        own = passed.setdefault(batch.first, {})
        call = with_passed(batch.calls[number], copied(own) if tried else own)
        with self._computing(hidden), eager_experts(self.experts):
            return first_output(call_layer(self.layers[number], self._given(hidden), call)).float()

    def _computing(self, hidden: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        mixed = self.products != torch.float32 and not self.narrow
        return autocast_to(hidden.device.type, self.products, enabled=mixed)

    def _given(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.to(self.products) if self.narrow else hidden

    @property
    def passes_on(self) -> bool:
        """Whether layers may pass on other values than hidden states, which `States.dump` does not write."""
        return any(passes_on(batch.calls) for batch in self.batches)

    def logits(
        self, batch: Batch, row: int, hidden: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(length, vocabulary) in float32, for sample ``row`` of a micro-batch; with ``positions`` (n,), int64, only
        those: (n, vocabulary). ``hidden``: (length, hidden size), its hidden states after the last layer. Called while
        the weights outside the layers are in memory."""
        last = len(self.layers) - 1

        def stub(number: int) -> Callable[..., Any]:
            further = self.tuples[number]

            def forward(*args: Any, **kwargs: Any) -> Any:
                found = self._given(hidden[None]) if number == last else hidden_of(args, kwargs)
                return found if further is None else (found, *(None for _ in range(further)))

            return forward

        model, ids = self.execution.model, batch.input_ids[row : row + 1]
        with replaced_layers(self.layers, stub), self._computing(hidden):
            found: torch.Tensor = (
                model(input_ids=ids, use_cache=False).logits if positions is None else logits_at(model, ids, positions)
            )
        return found[0].float()


def check_tokens(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Token ids on the model's device. Raises `ModelError` when one is outside the vocabulary."""
    ids = ids.to(model.device)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= vocabulary:
        raise ModelError(f"token {int(ids.max())} is outside the model's vocabulary of {vocabulary}")
    return ids


def _same(one: Any, other: Any) -> bool:
    """Whether arguments of layers are equal."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool | int | float | str) and one == other
