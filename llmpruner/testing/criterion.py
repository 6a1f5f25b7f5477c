"""Conformance tests for importance criteria."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from ..engine.signals import Signal
from ..engine.walk import CalibrationSet
from ..models.model import Model
from ..pruning.criteria.base import ImportanceCriterion
from ..pruning.criteria.estimate import estimate, scored_spans
from ..structure.coupling import EXPERT, CoupledGroup, CouplingGraph
from .components import check_component, label, settings_grid
from .models import first_change, scramble, tiny_llama, tiny_mixture


class CriterionConformance:
    """Tests for ``criterion`` with all `Literal` and `bool` settings; on a mixture too if it scores experts."""

    criterion: ClassVar[type[ImportanceCriterion]]

    def loaded(self) -> Model:
        """The model whose units are scored, the same at every call: a tiny LLaMA, or a tiny mixture for a criterion of
        experts alone. Override it for other units."""
        return tiny_mixture() if self.criterion.kinds == frozenset({EXPERT}) else tiny_llama()

    def _cases(self) -> Iterator[tuple[ImportanceCriterion, Model, tuple[CoupledGroup, ...]]]:
        """Criteria, the models to test each on, and the groups that it scores."""
        loaded, mixture = self.loaded(), tiny_mixture()
        for criterion in settings_grid(self.criterion):
            yield criterion, loaded, scorable(loaded.graph, criterion)
            if _scores_stacks(mixture.graph, criterion) and not _scores_stacks(loaded.graph, criterion):
                yield criterion, mixture, scorable(mixture.graph, criterion)

    def test_it_is_a_component_that_an_entry_point_registers(self) -> None:
        """It has a name, a summary, settings with defaults and descriptions, and a set of signals."""
        check_component("criterion", self.criterion)
        for criterion, _, groups in self._cases():
            signals, message = criterion.needs, f"needs {criterion.needs!r}; expected a frozenset of Signal"
            assert isinstance(signals, frozenset) and signals <= set(Signal), f"{label(criterion)} {message}"
            assert isinstance(criterion.signed, bool), f"{label(criterion)}: signed must be True or False"
            assert groups, f"{label(criterion)} scores no unit of the model that it is tested on; override loaded()"

    def test_every_saliency_is_a_finite_tensor(self) -> None:
        """Its shape is that of the parameter, or (units,); it has negative values if the criterion is ``signed``."""
        for criterion, loaded, groups in self._cases():
            checked, returned = _checked(criterion)
            _scores(loaded, checked, groups)
            negative, message = any(bool((value < 0).any()) for value in returned), "none of its saliencies is negative"
            assert negative or not criterion.signed, f"{label(criterion)} is signed, but {message}"

    def test_it_leaves_the_model_as_it_was(self) -> None:
        """A criterion gets the tensors of the model; changing them in place would change the pruned model."""
        for criterion, loaded, groups in self._cases():
            before = copy.deepcopy(loaded.network.state_dict())
            _scores(loaded, criterion, groups)
            change = first_change(before, loaded.network.state_dict())
            assert not change, f"{label(criterion)} changes the model: {change}"

    def test_the_same_seed_gives_the_same_scores(self) -> None:
        """Random numbers must be from ``signals.generator``, not from global generators."""
        for criterion, loaded, groups in self._cases():
            scramble(0)
            expected = _scores(loaded, criterion, groups)
            for number, again in enumerate((criterion, type(criterion)(criterion.settings)), start=1):
                scramble(number)
                scores = _scores(loaded, again, groups)
                _check_equal(expected, scores, f"{label(criterion)} gives other scores when run again")

    def test_a_unit_scores_alike_alone(self) -> None:
        """The units of every kind get the same scores whether or not other kinds are scored too."""
        for criterion, loaded, groups in self._cases():
            together = _scores(loaded, criterion, groups)
            for kind in dict.fromkeys(group.kind for group in groups):
                apart = _scores(loaded, criterion, loaded.graph.of_kinds([kind]))
                message = f"{label(criterion)} scores {kind} units differently when nothing else is scored"
                _check_equal({name: together[name] for name in apart}, apart, message)

    def test_a_matrix_of_a_stack_scores_alike_alone(self) -> None:
        """If it gets the matrices of a stack one at a time (``by_matrix``), it scores them as in a whole stack."""
        for criterion, loaded, groups in self._cases() if self.criterion.by_matrix else ():
            whole = copy.copy(criterion)
            whole.by_matrix = False  # type: ignore[misc]
            message = f"{label(criterion)} says by_matrix, but a stack scores otherwise when it is whole"
            _check_equal(_scores(loaded, whole, groups), _scores(loaded, criterion, groups), message)

    def test_it_tells_units_apart(self) -> None:
        """Not all units of a group may have equal scores."""
        for criterion, loaded, groups in self._cases():
            for name, values in _scores(loaded, criterion, groups).items():
                message = f"gives all {len(values)} units of group '{name}' the score {values[0]:g}"
                assert len(values) == 1 or len(set(values.tolist())) > 1, f"{label(criterion)} {message}"


def scorable(graph: CouplingGraph, criterion: ImportanceCriterion) -> tuple[CoupledGroup, ...]:
    """The groups whose units a criterion scores."""
    return tuple(group for group in graph.groups if criterion.accepts(group.kind))


def _scores_stacks(graph: CouplingGraph, criterion: ImportanceCriterion) -> bool:
    spans = scored_spans(graph, scorable(graph, criterion), criterion)
    return any(len(graph.shapes[name]) == 3 for name in spans)


def _scores(
    loaded: Model, criterion: ImportanceCriterion, groups: Sequence[CoupledGroup]
) -> Mapping[str, torch.Tensor]:
    tokens = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(0))
    return estimate(loaded.network, loaded.graph, groups, criterion, CalibrationSet(tokens, "random tokens"))


def _checked(criterion: ImportanceCriterion) -> tuple[ImportanceCriterion, list[torch.Tensor]]:
    """A copy of ``criterion`` whose results are checked, and the list that they are added to."""
    checked, returned = copy.copy(criterion), list[torch.Tensor]()

    def check(method: str, value: Any, shape: Sequence[int] | None) -> Any:
        if value is not None:
            _check_tensor(f"{label(criterion)}: {method}", value, shape)
            returned.append(value)
        return value

    def measure(product: Any) -> Any:
        return {name: check(f"measure, '{name}'", value, None) for name, value in criterion.measure(product).items()}

    def score_units(signals: Any, axis: Any, index_UK: torch.Tensor) -> Any:
        return check("score_units", criterion.score_units(signals, axis, index_UK), index_UK.shape[:1])

    vars(checked).update(
        measure=measure,
        saliency=lambda signals: check("saliency", criterion.saliency(signals), signals.weight.shape),
        score_units=score_units,
        score_layers=lambda stream: check("score_layers", criterion.score_layers(stream), stream.cosine.shape),
        score_tokens=lambda use: check("score_tokens", criterion.score_tokens(use), use.counts.shape),
    )
    return checked, returned


def _check_tensor(where: str, value: Any, shape: Sequence[int] | None) -> None:
    kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
    assert getattr(kind, "is_floating_point", False), f"{where} is {kind}, not a tensor of floating-point numbers"
    assert shape is None or value.shape == shape, f"{where} has shape {tuple(value.shape)}, expected {tuple(shape)}"
    wrong = torch.nonzero(~torch.isfinite(value))
    assert not len(wrong), f"{where} is {value[tuple(wrong[0])]:g} at {tuple(wrong[0].tolist())}"
    assert not value.requires_grad, f"{where} still carries a graph; compute it without gradients"


def _check_equal(expected: Mapping[str, torch.Tensor], actual: Mapping[str, torch.Tensor], what: str) -> None:
    for name, values in expected.items():
        near = torch.isclose(actual[name], values, rtol=1e-5, atol=1e-12)
        if not bool(near.all()):
            unit = int(torch.nonzero(~near)[0])
            scores = f"{float(values[unit]):g} and {float(actual[name][unit]):g}"
            raise AssertionError(f"{what}: group '{name}', unit {unit} scores {scores}")
