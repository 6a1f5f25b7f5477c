"""Watching a criterion at work: what it is shown, what it reads of that, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..engine.signals import InputStats, ParameterSignals, Signal, StreamStats
from ..importance.base import ImportanceCriterion

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FIELDS = {
    Signal.WEIGHT: "weight",
    Signal.GRAD: "grad",
    Signal.GRAD_SQ: "grad_sq",
    Signal.INPUT_STATS: "inputs",
    Signal.GRAM: "gram",
    Signal.STREAM: "stream",
}
"""Signal → the attribute that a criterion reads it by."""

_FREE = frozenset({Signal.WEIGHT})
"""Costs nothing, so that every criterion sees it."""


@dataclass
class Call:
    """One call of a criterion. ``parameter``: of the model, or which layer. ``shown``: the signals with what belongs
    to them. ``returned``: what came back; ``expected``: its shape."""

    parameter: str
    shown: dict[Signal, Any]
    expected: tuple[int, ...]
    read: set[str] = field(default_factory=set)
    returned: Any = None


class Spy(ImportanceCriterion):
    """Stands before another criterion and keeps its `calls`."""

    def __init__(self, inner: ImportanceCriterion, model: PreTrainedModel) -> None:
        self.inner, self.model = inner, model
        self.variant = inner.variant
        self.roles = inner.roles  # type: ignore[misc]
        self.calls: list[Call] = []

    @property
    def signals(self) -> frozenset[Signal]:
        return self.inner.signals

    @property
    def signed(self) -> bool:
        return self.inner.signed

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        call = self._call(signals, tuple(signals.weight.shape))
        result: torch.Tensor = self._ask("saliency", call, _Reader(signals, call.read))
        _check_tensor(self.inner, "saliency", call)
        return result

    def score_units(self, signals: ParameterSignals, axis: int, index_UK: torch.Tensor) -> torch.Tensor | None:
        call = self._call(signals, (len(index_UK),))
        result: torch.Tensor | None = self._ask("score_units", call, _Reader(signals, call.read), axis, index_UK)
        if result is not None:
            _check_tensor(self.inner, "score_units", call)
        return result

    def score_layer(self, stream: StreamStats) -> float:
        call = Call(f"layer {len(self.calls)}", {Signal.STREAM: stream}, (), {"stream"})
        self.calls.append(call)
        return float(self._ask("score_layer", call, stream))

    def _call(self, signals: ParameterSignals, expected: tuple[int, ...]) -> Call:
        gram = None if signals.inputs is None else signals.inputs.gram
        shown: dict[Signal, Any] = {s: getattr(signals, f, None) for s, f in FIELDS.items()}
        shown[Signal.GRAM] = gram
        return Call(self._parameter(signals.weight), shown, expected)

    def _ask(self, method: str, call: Call, *arguments: Any) -> Any:
        try:
            call.returned = getattr(self.inner, method)(*arguments)
        except Exception as error:
            unasked = sorted(FIELDS[s] for s in set(call.shown) - self.inner.signals - _FREE)
            hint = f"; not asked for and so None: {', '.join(unasked)}" if unasked else ""
            raise AssertionError(
                f"{label(self.inner)}: {method} of '{call.parameter}' raises {type(error).__name__}: {error}{hint}"
            ) from error
        if call.returned is not None:
            self.calls.append(call)
        return call.returned

    def _parameter(self, weight: torch.Tensor) -> str:
        """Criteria are not told names; no two parameters of a random model are equal."""
        parameters: list[tuple[str, torch.Tensor]] = list(self.model.named_parameters())
        return next(name for name, p in parameters if p.shape == weight.shape and torch.equal(p, weight))


class _Reader:
    """Signals that remember which of them were read."""

    def __init__(self, shown: Any, read: set[str]) -> None:
        self._shown, self._read = shown, read

    def __getattr__(self, name: str) -> Any:
        self._read.add(name)
        value = getattr(self._shown, name)
        return _Reader(value, self._read) if isinstance(value, InputStats) else value


def label(criterion: ImportanceCriterion) -> str:
    """A criterion with its variant, as failures name it."""
    return f"criterion '{criterion.name}'" + (f" ({criterion.variant})" if criterion.variant else "")


def unasked(criterion: ImportanceCriterion, call: Call) -> list[str]:
    """Fields of signals that the criterion sees without having asked."""
    asked = criterion.signals | _FREE
    if Signal.GRAM in asked:
        asked |= {Signal.INPUT_STATS}  # the outer products come with the other statistics
    return sorted(FIELDS[signal] for signal, value in call.shown.items() if signal not in asked and value is not None)


def unread(criterion: ImportanceCriterion, calls: list[Call]) -> list[str]:
    """Fields of signals that the criterion asked for and read in none of its calls."""
    read = {name for call in calls for name in call.read}
    return sorted(FIELDS[signal] for signal in criterion.signals - _FREE if FIELDS[signal] not in read)


def _check_tensor(criterion: ImportanceCriterion, method: str, call: Call) -> None:
    value = call.returned
    where = f"{label(criterion)}: {method} of '{call.parameter}'"
    assert isinstance(value, torch.Tensor) and value.is_floating_point(), (
        f"{where} is {value.dtype if isinstance(value, torch.Tensor) else type(value).__name__}, "
        "not a tensor of floating-point numbers"
    )
    assert tuple(value.shape) == call.expected, f"{where} has shape {tuple(value.shape)}, expected {call.expected}"
