"""Conformance tests for importance criteria."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..calibration.calibration import CalibrationSet
from ..discovery.routes import ClosedRoutes
from ..discovery.silenced import distance, logits
from ..discovery.verify import TOLERANCE, first_difference
from ..engine.signals import Signal
from ..models.surgery import silence
from ..plugins.catalog import Catalog
from ..plugins.host import plugin_manager
from ..pruning.criteria.base import ImportanceCriterion
from ..pruning.criteria.estimate import estimate, scored_parameters
from ..recipes.pipeline import make_plan
from ..structure.coupling import EXPERT, CoupledGroup, CouplingGraph
from ..structure.kept import removed_modules
from .grid import settings_grid
from .hosts import check_named, check_registered, check_settings
from .jobs import cut_by, small_job
from .spy import Call, Spy, label, unasked, unread
from .tiny import first_change, scramble, tiny_llama, tiny_mixture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..models.model import Model


class CriterionConformance:
    """Tests for a criterion, with each value of each of its `Literal` settings.

    ``criterion``: the class under test. `loaded` is a tiny LLaMA with every kind of unit, or a tiny mixture for a
    criterion of experts alone; override it for a criterion of other units. A criterion that scores units of experts is
    also tested on a tiny mixture, whose experts are stacks: parameters with three axes.
    """

    criterion: ClassVar[type[ImportanceCriterion]]

    def loaded(self) -> Model:
        """The model whose units are scored; random, but the same at every call."""
        return tiny_mixture() if self.criterion.kinds == frozenset({EXPERT}) else tiny_llama()

    def _models(self, criterion: ImportanceCriterion) -> list[Model]:
        """`loaded`, and a mixture for a criterion that scores stacks, if `loaded` has none."""
        loaded, mixture = self.loaded(), tiny_mixture()
        more = stacks(mixture.graph, criterion) and not stacks(loaded.graph, criterion)
        return [loaded, mixture] if more else [loaded]

    def test_an_entry_point_registers_it(self) -> None:
        host = plugin_manager()
        check_registered(Catalog(host).criteria, host, self.criterion)

    def test_it_says_what_it_is(self) -> None:
        """It has a name, a summary, settings with defaults and descriptions, and a set of signals."""
        cls = self.criterion
        check_named("criterion", cls)
        check_settings("criterion", cls)
        for criterion in self._instances():
            asked = criterion.signals
            assert isinstance(asked, frozenset) and asked <= set(Signal), (
                f"{label(criterion)} needs {asked!r}; expected a frozenset of Signal"
            )
            assert isinstance(criterion.signed, bool), f"{label(criterion)}: signed must be True or False"
            assert scorable(self.loaded().graph, criterion), (
                f"{label(criterion)} scores no unit of the model that it is tested on; override loaded()"
            )

    def test_every_saliency_is_a_finite_tensor(self) -> None:
        """Its shape is that of the parameter, or (units,); it has negative values if the criterion is ``signed``."""
        for criterion in self._instances():
            calls = [call for loaded in self._models(criterion) for call in self._observe(criterion, loaded)]
            for call in calls:
                _check_finite(criterion, call)
            if criterion.signed:
                assert any(bool((call.returned < 0).any()) for call in calls), (
                    f"{label(criterion)} is signed, but none of its saliencies is negative"
                )

    def test_it_gets_what_it_needs_and_nothing_else(self) -> None:
        """Signals that it does not need are None; those that it needs are read, as each takes time and memory."""
        for criterion in self._instances():
            calls = self._observe(criterion, self.loaded())
            for call in calls:
                extra = unasked(criterion, call)
                assert not extra, (
                    f"{label(criterion)} did not ask for {', '.join(extra)}, and sees it of '{call.parameter}'"
                )
            idle = unread(criterion, calls)
            assert not idle, f"{label(criterion)} asks for {', '.join(idle)}, and reads it of no parameter"

    def test_it_leaves_the_model_as_it_was(self) -> None:
        """A criterion gets the tensors of the model; changing them in place would change the pruned model."""
        for criterion in self._instances():
            loaded = self.loaded()
            before = copy.deepcopy(loaded.model.state_dict())
            self._scores(loaded, criterion, scorable(loaded.graph, criterion))
            change = first_change(before, loaded.model.state_dict())
            assert not change, f"{label(criterion)} changes the model: {change}"

    def test_the_same_seed_gives_the_same_scores(self) -> None:
        """Random numbers must be from ``signals.generator``, not from global generators."""
        for first, again in zip(self._instances(), self._instances(), strict=True):
            for loaded in self._models(first):
                runs = []
                for number, criterion in enumerate((first, first, again)):
                    scramble(number)
                    runs.append(self._scores(loaded, criterion, scorable(loaded.graph, criterion)))
                for run in runs[1:]:
                    _check_equal(runs[0], run, f"{label(first)} gives other scores when run again")

    def test_a_unit_scores_alike_alone(self) -> None:
        """The units of every kind get the same scores whether or not other kinds are scored beside them."""
        for criterion in self._instances():
            for loaded in self._models(criterion):
                together = self._scores(loaded, criterion, scorable(loaded.graph, criterion))
                for kind in dict.fromkeys(group.kind for group in scorable(loaded.graph, criterion)):
                    alone = self._scores(loaded, criterion, loaded.graph.of_kinds([kind]))
                    _check_equal(
                        {name: together[name] for name in alone},
                        alone,
                        f"{label(criterion)} scores {kind} units differently when nothing else is scored",
                    )

    def test_a_matrix_of_a_stack_scores_alike_alone(self) -> None:
        """If it gets the matrices of a stack one at a time (``by_matrix``), its scores are those of whole stacks."""
        for criterion in self._instances():
            for loaded in self._models(criterion) if criterion.by_matrix else ():
                groups = scorable(loaded.graph, criterion)
                whole = Spy(criterion, loaded.model, by_matrix=False)
                _check_equal(
                    self._scores(loaded, whole, groups),
                    self._scores(loaded, criterion, groups),
                    f"{label(criterion)} says by_matrix, but a stack scores otherwise when it is whole",
                )

    def test_it_tells_units_apart(self) -> None:
        """Not all units of a group may have equal scores."""
        for criterion in self._instances():
            loaded = self.loaded()
            for name, values in self._scores(loaded, criterion, scorable(loaded.graph, criterion)).items():
                assert len(values) == 1 or len(set(values.tolist())) > 1, (
                    f"{label(criterion)} gives all {len(values)} units of group '{name}' the score {values[0]:g}"
                )

    def test_what_it_chooses_can_be_cut(self) -> None:
        """Plan and cut half the units of every kind: the logits equal those of the model with these units silenced."""
        for criterion in self._instances():
            for number, one in enumerate(self._models(criterion)):
                for kind in dict.fromkeys(group.kind for group in scorable(one.graph, criterion)):
                    self._check_cut(criterion, self._models(criterion)[number], kind)

    def _check_cut(self, criterion: ImportanceCriterion, loaded: Model, kind: str) -> None:
        plan, _ = make_plan(loaded, small_job(criterion, by="units", amount=0.5, kinds=(kind,)))
        reference, mode = _silenced(loaded, plan.kept)
        cut = cut_by(loaded, plan).model
        tokens = torch.arange(3, 90).view(3, 29)
        with mode:
            expected = logits(reference, tokens)
        if not distance(logits(cut, tokens), expected) <= TOLERANCE:
            where = first_difference(cut, reference, tokens, mode)
            raise AssertionError(f"{label(criterion)}: cut {kind} units disagree with silenced ones at {where}")

    def _instances(self) -> list[ImportanceCriterion]:
        return settings_grid(self.criterion)

    def _scores(
        self, loaded: Model, criterion: ImportanceCriterion, groups: Sequence[CoupledGroup]
    ) -> Mapping[str, torch.Tensor]:
        tokens = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(0))
        return estimate(loaded.model, loaded.graph, groups, criterion, CalibrationSet(tokens, "random tokens")).by_group

    def _observe(self, criterion: ImportanceCriterion, loaded: Model) -> list[Call]:
        spy = Spy(criterion, loaded.model)
        self._scores(loaded, spy, scorable(loaded.graph, criterion))
        return spy.calls


def scorable(graph: CouplingGraph, criterion: ImportanceCriterion) -> tuple[CoupledGroup, ...]:
    """The groups whose units a criterion scores."""
    return tuple(group for group in graph.groups if criterion.accepts(group.kind))


def stacks(graph: CouplingGraph, criterion: ImportanceCriterion) -> bool:
    """Whether a criterion scores parameters with three axes, as stacks of experts are."""
    groups = scorable(graph, criterion)
    return any(len(graph.shapes[name]) == 3 for name in scored_parameters(graph, groups, criterion))


def _check_finite(criterion: ImportanceCriterion, call: Call) -> None:
    value = torch.as_tensor(call.returned)
    where = f"{label(criterion)}: what it returns for '{call.parameter}'"
    wrong = torch.nonzero(~torch.isfinite(value))
    assert not len(wrong), f"{where} is {value[tuple(wrong[0])]:g} at {tuple(wrong[0].tolist())}"
    assert not value.requires_grad, f"{where} still carries a graph; compute it without gradients"


def _check_equal(expected: Mapping[str, torch.Tensor], actual: Mapping[str, torch.Tensor], what: str) -> None:
    for name, values in expected.items():
        near = torch.isclose(actual[name], values, rtol=1e-5, atol=1e-12)
        if not bool(near.all()):
            unit = int(torch.nonzero(~near)[0])
            raise AssertionError(
                f"{what}: group '{name}', unit {unit} scores {float(values[unit]):g} and {float(actual[name][unit]):g}"
            )


def _silenced(loaded: Model, kept: Mapping[str, Sequence[int]]) -> tuple[PreTrainedModel, Any]:
    """A copy of the model with removed units silenced, and a context to run it in."""
    model, graph = copy.deepcopy(loaded.model), loaded.graph
    for path in removed_modules(graph, kept):
        model.get_submodule(path).register_forward_hook(_skip)
    experts = {n: u for n, u in kept.items() if graph.by_name[n].kind == EXPERT}
    silence(model, graph, {n: u for n, u in kept.items() if n not in experts and not graph.by_name[n].modules})
    return model, ClosedRoutes(model, graph, experts) if experts else nullcontext()


def _skip(module: Any, args: tuple[Any, ...], output: Any) -> Any:
    """The output of a removed layer: its input."""
    del module
    return args[0] if isinstance(output, torch.Tensor) else (args[0], *output[1:])
