"""A wrapper around a criterion that records its arguments, the attributes that it reads, and its results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..engine.position import UnitAxis
from ..engine.signals import InputStats, ParameterSignals, Product, Signal, StreamStats
from ..errors import LlmprunerError
from ..pruning.criteria.base import ImportanceCriterion
from .grid import changed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

FIELDS = {
    Signal.WEIGHT: "weight",
    Signal.GRAD: "grad",
    Signal.GRAD_SQ: "grad_sq",
    Signal.INPUT_STATS: "inputs",
    Signal.GRAM: "gram",
    Signal.PRODUCT: "products",
    Signal.PRODUCT_GRAD: "output_grads",
    Signal.STREAM: "stream",
    Signal.STREAM_BLOCKS: "stream",
}
"""Signal → the attribute that contains it."""

_FREE = frozenset({Signal.WEIGHT})
"""Available to every criterion."""
_IMPLIED = {Signal.GRAM: {Signal.INPUT_STATS}, Signal.PRODUCT_GRAD: {Signal.PRODUCT}}
"""Signal → signals that are measured with it."""


@dataclass
class Call:
    """One call of a criterion. ``parameter``: its name, or ``the layers``. ``shown``: the signals in the arguments.
    ``read``: the attributes that were read. ``returned``: the result. ``expected``: its shape."""

    parameter: str
    shown: dict[Signal, Any]
    expected: tuple[int, ...]
    read: set[str] = field(default_factory=set)
    returned: Any = None


class Spy(ImportanceCriterion):
    """Passes every call on to another criterion, and records those that returned a tensor as `calls`.

    ``by_matrix``: None for that of the other criterion."""

    def __init__(self, inner: ImportanceCriterion, model: PreTrainedModel, *, by_matrix: bool | None = None) -> None:
        self.inner, self.model = inner, model
        self.name = inner.name  # type: ignore[misc]
        self.by_matrix = inner.by_matrix if by_matrix is None else by_matrix  # type: ignore[misc]
        self.settings = inner.settings
        self.calls: list[Call] = []

    @property
    def signals(self) -> frozenset[Signal]:
        return self.inner.signals

    @property
    def signed(self) -> bool:
        return self.inner.signed

    def accepts(self, kind: str) -> bool:
        return self.inner.accepts(kind)

    def counts(self, axis: UnitAxis) -> bool:
        return self.inner.counts(axis)

    def measure(self, product: Product) -> Mapping[str, torch.Tensor]:
        where, read = f"a product in layer {product.position.layer}", set[str]()
        shown: dict[Signal, Any] = {Signal.PRODUCT_GRAD: product.output_grads}
        found: Mapping[str, torch.Tensor] = self._ask("measure", Call(where, shown, ()), _Reader(product, read))
        if "input_grads" in read:
            read.add(FIELDS[Signal.PRODUCT_GRAD])
        self.calls += [Call(f"{where}, '{name}'", shown, (), read, value) for name, value in found.items()]
        return found

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        call = self._call(signals, tuple(signals.weight.shape))
        result: torch.Tensor = self._ask("saliency", call, _Reader(signals, call.read))
        return self._keep("saliency", call, result)

    def score_units(self, signals: ParameterSignals, axis: UnitAxis, index_UK: torch.Tensor) -> torch.Tensor | None:
        call = self._call(signals, (len(index_UK),))
        result: torch.Tensor | None = self._ask("score_units", call, _Reader(signals, call.read), axis, index_UK)
        return None if result is None else self._keep("score_units", call, result)

    def score_layers(self, stream: StreamStats) -> torch.Tensor:
        shown = {signal: stream for signal in self.signals if FIELDS[signal] == "stream"}
        call = Call("the layers", shown, (stream.cosine.shape[1],), {"stream"})
        return self._keep("score_layers", call, self._ask("score_layers", call, stream))

    def _call(self, signals: ParameterSignals, expected: tuple[int, ...]) -> Call:
        gram = None if signals.inputs is None else signals.inputs.gram
        shown: dict[Signal, Any] = {s: getattr(signals, f, None) for s, f in FIELDS.items()}
        shown[Signal.GRAM] = gram
        return Call(self._parameter(signals.weight, signals.matrix), shown, expected)

    def _ask(self, method: str, call: Call, *arguments: Any) -> Any:
        try:
            return getattr(self.inner, method)(*arguments)
        except LlmprunerError:
            raise
        except Exception as error:
            missing = sorted(FIELDS[s] for s in set(call.shown) - self.inner.signals - _FREE)
            hint = f"; not asked for and so None: {', '.join(missing)}" if missing else ""
            raise AssertionError(
                f"{label(self.inner)}: {method} of '{call.parameter}' raises {type(error).__name__}: {error}{hint}"
            ) from error

    def _keep(self, method: str, call: Call, result: torch.Tensor) -> torch.Tensor:
        _check_tensor(self.inner, method, call, result)
        call.returned = result
        self.calls.append(call)
        return result

    def _parameter(self, weight: torch.Tensor, matrix: int | None) -> str:
        """The name of a parameter, found by its values, as no two parameters of a random model are equal. ``matrix``:
        the number of ``weight`` in a stack."""
        parameters: list[tuple[str, torch.Tensor]] = list(self.model.named_parameters())
        for name, parameter in parameters:
            shown = parameter if matrix is None else parameter[matrix : matrix + 1]
            if shown.shape == weight.shape and torch.equal(shown, weight):
                return name
        raise ValueError(f"no parameter has the values of a weight of shape {tuple(weight.shape)}")


class _Reader:
    """A proxy of signals that records the attributes that are read."""

    def __init__(self, shown: Any, read: set[str]) -> None:
        self._shown, self._read = shown, read

    def __getattr__(self, name: str) -> Any:
        self._read.add(name)
        value = getattr(self._shown, name)
        return _Reader(value, self._read) if isinstance(value, InputStats) else value


def label(criterion: ImportanceCriterion) -> str:
    """The name of a criterion with the settings that differ from their defaults, for messages."""
    settings = changed(criterion)
    return f"criterion '{criterion.name}'" + (f" ({settings})" if settings else "")


def unasked(criterion: ImportanceCriterion, call: Call) -> list[str]:
    """Fields of signals that the criterion gets but does not need."""
    asked = criterion.signals | _FREE
    asked = asked.union(*(_IMPLIED.get(signal, ()) for signal in asked))
    return sorted(FIELDS[signal] for signal, value in call.shown.items() if signal not in asked and value is not None)


def unread(criterion: ImportanceCriterion, calls: list[Call]) -> list[str]:
    """Fields of signals that the criterion needs but does not read in any call."""
    read = {name for call in calls for name in call.read}
    return sorted(FIELDS[signal] for signal in criterion.signals - _FREE if FIELDS[signal] not in read)


def _check_tensor(criterion: ImportanceCriterion, method: str, call: Call, value: Any) -> None:
    where = f"{label(criterion)}: {method} of '{call.parameter}'"
    assert isinstance(value, torch.Tensor) and value.is_floating_point(), (
        f"{where} is {value.dtype if isinstance(value, torch.Tensor) else type(value).__name__}, "
        "not a tensor of floating-point numbers"
    )
    assert tuple(value.shape) == call.expected, f"{where} has shape {tuple(value.shape)}, expected {call.expected}"
