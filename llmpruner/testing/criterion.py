"""Conformance tests for importance criteria."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..calibration.calibration import CalibrationSet
from ..discovery.oracle import TOLERANCE, ClosedRoutes, distance, first_difference, logits
from ..engine.signals import InputStats, ParameterSignals, Product, Signal, StreamStats, UnitAxis
from ..errors import LlmprunerError
from ..models.surgery import silence
from ..pipeline import make_plan
from ..pruning.criteria.base import ImportanceCriterion
from ..pruning.criteria.estimate import estimate, scored_parameters
from ..structure.coupling import EXPERT, CoupledGroup, CouplingGraph
from ..structure.kept import removed_modules
from .components import check_component, label, settings_grid
from .models import cut_by, first_change, scramble, small_job, tiny_llama, tiny_mixture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..models.model import Model


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

    def test_it_is_a_component_that_an_entry_point_registers(self) -> None:
        """It has a name, a summary, settings with defaults and descriptions, and a set of signals."""
        check_component("criterion", self.criterion)
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
            spies = [self._observe(criterion, loaded) for loaded in self._models(criterion)]
            if criterion.signed:
                assert any(bool((value < 0).any()) for spy in spies for value in spy.returned), (
                    f"{label(criterion)} is signed, but none of its saliencies is negative"
                )

    def test_it_reads_what_it_needs(self) -> None:
        """A signal in `signals` takes time and memory, so that it must be read."""
        for criterion in self._instances():
            read = self._observe(criterion, self.loaded()).read
            idle = sorted(FIELDS[s] for s in criterion.signals - {Signal.WEIGHT} if FIELDS[s] not in read)
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
                    apart = self._scores(loaded, criterion, loaded.graph.of_kinds([kind]))
                    _check_equal(
                        {name: together[name] for name in apart},
                        apart,
                        f"{label(criterion)} scores {kind} units differently when nothing else is scored",
                    )

    def test_a_matrix_of_a_stack_scores_alike_alone(self) -> None:
        """If it gets the matrices of a stack one at a time (``by_matrix``), its scores are those of whole stacks."""
        for criterion in self._instances():
            for loaded in self._models(criterion) if criterion.by_matrix else ():
                groups = scorable(loaded.graph, criterion)
                whole = _Spy(criterion, loaded.model, by_matrix=False)
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
            for number, model in enumerate(self._models(criterion)):
                for kind in dict.fromkeys(group.kind for group in scorable(model.graph, criterion)):
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

    def _observe(self, criterion: ImportanceCriterion, loaded: Model) -> _Spy:
        spy = _Spy(criterion, loaded.model)
        self._scores(loaded, spy, scorable(loaded.graph, criterion))
        return spy


class _Spy(ImportanceCriterion):
    """Passes every call on to another criterion, and checks the results. ``read``: the attributes of signals that were
    read. ``returned``: the results."""

    def __init__(self, inner: ImportanceCriterion, model: PreTrainedModel, *, by_matrix: bool | None = None) -> None:
        self.inner, self.model = inner, model
        self.name = inner.name  # type: ignore[misc]
        self.by_matrix = inner.by_matrix if by_matrix is None else by_matrix  # type: ignore[misc]
        self.settings = inner.settings
        self.read, self.returned = set[str](), list[torch.Tensor]()

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
        place = f"a product in layer {product.position.layer}"
        values: Mapping[str, torch.Tensor] = self._ask("measure", place, _Reader(product, self.read))
        if "input_grads" in self.read:
            self.read.add(FIELDS[Signal.PRODUCT_GRAD])
        for name, value in values.items():
            self._check("measure", f"{place}, '{name}'", value, tuple(value.shape))
        return values

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        place = self._parameter(signals)
        value = self._ask("saliency", place, _Reader(signals, self.read))
        return self._check("saliency", place, value, tuple(signals.weight.shape))

    def score_units(self, signals: ParameterSignals, axis: UnitAxis, index_UK: torch.Tensor) -> torch.Tensor | None:
        place = self._parameter(signals)
        value = self._ask("score_units", place, _Reader(signals, self.read), axis, index_UK)
        return None if value is None else self._check("score_units", place, value, (len(index_UK),))

    def score_layers(self, stream: StreamStats) -> torch.Tensor:
        self.read.add("stream")
        value = self._ask("score_layers", "the layers", stream)
        return self._check("score_layers", "the layers", value, (stream.cosine.shape[1],))

    def _ask(self, method: str, place: str, *arguments: Any) -> Any:
        try:
            return getattr(self.inner, method)(*arguments)
        except LlmprunerError:
            raise
        except Exception as error:
            raise AssertionError(
                f"{label(self.inner)}: {method} of {place} raises {type(error).__name__}: {error} (signals that it "
                "does not ask for are None)"
            ) from error

    def _check(self, method: str, place: str, value: Any, expected: tuple[int, ...]) -> torch.Tensor:
        where = f"{label(self.inner)}: {method} of {place}"
        assert isinstance(value, torch.Tensor) and value.is_floating_point(), (
            f"{where} is {value.dtype if isinstance(value, torch.Tensor) else type(value).__name__}, "
            "not a tensor of floating-point numbers"
        )
        assert tuple(value.shape) == expected, f"{where} has shape {tuple(value.shape)}, expected {expected}"
        wrong = torch.nonzero(~torch.isfinite(value))
        assert not len(wrong), f"{where} is {value[tuple(wrong[0])]:g} at {tuple(wrong[0].tolist())}"
        assert not value.requires_grad, f"{where} still carries a graph; compute it without gradients"
        self.returned.append(value)
        return value

    def _parameter(self, signals: ParameterSignals) -> str:
        """The name of a parameter, by its values: no two parameters of a random model are equal."""
        weight, matrix = signals.weight, signals.matrix
        for name, parameter in self.model.named_parameters():
            shown = parameter if matrix is None else parameter[matrix : matrix + 1]
            if shown.shape == weight.shape and torch.equal(shown, weight):
                return f"'{name}'"
        return "a parameter"


class _Reader:
    """A proxy of signals that records the attributes that are read."""

    def __init__(self, shown: Any, read: set[str]) -> None:
        self._shown, self._read = shown, read

    def __getattr__(self, name: str) -> Any:
        self._read.add(name)
        value = getattr(self._shown, name)
        return _Reader(value, self._read) if isinstance(value, InputStats) else value


def scorable(graph: CouplingGraph, criterion: ImportanceCriterion) -> tuple[CoupledGroup, ...]:
    """The groups whose units a criterion scores."""
    return tuple(group for group in graph.groups if criterion.accepts(group.kind))


def stacks(graph: CouplingGraph, criterion: ImportanceCriterion) -> bool:
    """Whether a criterion scores parameters with three axes, as stacks of experts are."""
    groups = scorable(graph, criterion)
    return any(len(graph.shapes[name]) == 3 for name in scored_parameters(graph, groups, criterion))


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
