"""The kits that plugin authors test with: what is built in passes them, and each check catches its mistake."""

import dataclasses
from typing import Any

import pytest
import torch
from pydantic import Field
from transformers import LlamaConfig, LlamaForCausalLM

from llmpruner import (
    Catalog,
    CheckpointError,
    ImportanceCriterion,
    ModelError,
    ModelFamily,
    ParameterSignals,
    RecoveryStrategy,
    Signal,
    TrainingResult,
    discover_graph,
)
from llmpruner.component import ComponentSettings
from llmpruner.discovery.tiny import random_instance
from llmpruner.plugins.manager import PluginManager
from llmpruner.recovery.strategies import FullStrategy, LoraStrategy
from llmpruner.testing import CriterionConformance, FamilyConformance, RecoveryConformance, catalog_with

BUILT_IN = Catalog(PluginManager(entry_points=False))[ImportanceCriterion]


@pytest.fixture(params=sorted(BUILT_IN))
def criterion(request: pytest.FixtureRequest) -> type[ImportanceCriterion]:
    return BUILT_IN[request.param]


@pytest.mark.parametrize("check", [name for name in vars(CriterionConformance) if name.startswith("test_")])
def test_built_in_criteria_conform(criterion, check):
    run(CriterionConformance, "criterion", criterion, check)


class TestLora(RecoveryConformance):
    strategy = LoraStrategy


class TestFull(RecoveryConformance):
    strategy = FullStrategy


def run(kit: type, attribute: str, cls: type, check: str, *arguments: Any) -> None:
    getattr(type("Case", (kit,), {attribute: cls})(), check)(*arguments)


class Good(ImportanceCriterion):
    """A criterion that every broken one below differs from in one thing."""

    name = "good"
    summary = "the absolute weight"

    def saliency(self, signals: ParameterSignals) -> Any:
        return signals.weight.abs()


def broken(**members: Any) -> type[ImportanceCriterion]:
    return type("Broken", (Good,), members)


def saliency(function: Any) -> type[ImportanceCriterion]:
    return broken(saliency=lambda self, signals: function(signals))


class Required(ComponentSettings):
    power: float = Field(description="A setting that users would have to give.")


class Undescribed(ComponentSettings):
    power: float = 1.0


class Counting(Good):
    """Counts the parameters that it has seen, until the first of all comes round again."""

    def saliency(self, signals: ParameterSignals) -> Any:
        vars(self).setdefault("norms", []).append(float(signals.weight.norm()))
        if vars(self)["norms"].count(float(signals.weight.norm())) > 1:
            vars(self)["norms"] = [float(signals.weight.norm())]
        return signals.weight.abs() * len(vars(self)["norms"])


NAN_OF_PRODUCTS = broken(
    needs=frozenset({Signal.WEIGHT, Signal.PRODUCT}),
    measure=lambda self, product: {"it": product.inputs.sum(0) / 0},
    saliency=lambda self, s: s.weight.abs() if s.products is None else s.over_inputs(s.products.sums["it"]),
)


def with_nan(signals: ParameterSignals) -> torch.Tensor:
    value = signals.weight.abs()
    value[..., -1] = float("nan")
    return value


def on_stacks(function: Any, **members: Any) -> type[ImportanceCriterion]:
    """A criterion that gives the absolute weight, and for a stack what ``function`` makes of it."""
    return broken(
        saliency=lambda self, s: s.weight.abs() if s.weight.dim() < 3 else function(s.weight.abs()), **members
    )


SALIENCY, STACKS = "test_every_saliency_is_a_finite_tensor", "test_a_matrix_of_a_stack_scores_alike_alone"
KEPT, ALONE, APART = "test_it_leaves_the_model_as_it_was", "test_a_unit_scores_alike_alone", "test_it_tells_units_apart"
NAMED, SEEDED = "test_it_is_a_component_that_an_entry_point_registers", "test_the_same_seed_gives_the_same_scores"
BROKEN_CRITERIA = [
    (NAMED, Good, r"no installed plugin has this criterion 'good'.* returns Good"),
    (NAMED, broken(name="l1"), r"no installed plugin has this criterion 'l1'"),
    (NAMED, broken(name="Good Idea"), "its name is 'Good Idea'; expected lower case"),
    (SALIENCY, saliency(lambda s: s.weight.abs().sum(0)), r"saliency has shape \(.*\), expected \(.*\)"),
    (SALIENCY, saliency(lambda s: s.weight.numpy()), "is ndarray, not a tensor"),
    (SALIENCY, saliency(lambda s: s.weight > 0), "is torch.bool, not a tensor of floating-point"),
    (SALIENCY, saliency(lambda s: s.weight.abs().requires_grad_()), "still carries a graph"),
    (SALIENCY, broken(signed=True), "is signed, but none of its saliencies is negative"),
    (SALIENCY, NAN_OF_PRODUCTS, "measure, 'it' is "),
    (KEPT, saliency(lambda s: s.weight.abs_()), r"changes the model: parameter '[\w.]+'"),
    (SEEDED, saliency(lambda s: torch.rand(s.weight.shape)), r"other scores when run again: group '.*', unit 0 scores"),
    (ALONE, Counting, r"scores \w+ units differently when nothing else is scored: group '.*', unit \d+ scores"),
    (APART, saliency(lambda s: torch.ones_like(s.weight)), "gives all 3 units of group 'layers.0"),
    (SALIENCY, broken(score_units=lambda self, signals, axis, index: index), "score_units is torch.int64, not a"),
    (SALIENCY, broken(score_units=lambda self, signals, axis, index: torch.ones(2)), r"shape \(2,\), expected \(48,"),
    (SALIENCY, saliency(with_nan), "saliency is nan at"),
    (APART, saliency(with_nan), "score that is not a finite number"),
    (STACKS, on_stacks(lambda w: w / w.mean(), by_matrix=True), "by_matrix, but a stack scores otherwise"),
    (SALIENCY, on_stacks(lambda w: w.sum(0)), r"saliency has shape \(.*\), expected \(7, "),
    (SALIENCY, on_stacks(lambda w: w.sum(0), by_matrix=True), r"saliency has shape \(.*\), expected \(1, "),
    (SEEDED, on_stacks(lambda w: torch.rand(w.shape)), r"other scores when run again: group '.*', unit 0 scores"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "cls", "message"), BROKEN_CRITERIA)
def test_a_broken_criterion_is_caught(check, cls, message):
    with pytest.raises((AssertionError, ModelError), match=message):
        run(CriterionConformance, "criterion", cls, check)


class Steady(RecoveryStrategy):
    """Trains the output head a little at every step, and keeps its state; the broken ones differ in one thing."""

    name = "steady"
    summary = "adds a hundredth to the output head"

    def train(self, job: Any) -> TrainingResult:
        state = job.work_dir / "steps.txt"
        done = len(state.read_text().split()) if state.is_file() else 0
        self.start(job, done)
        for step in range(1, job.settings.max_steps + 1):
            self.step(job)
            if step > done:
                state.write_text(f"{step} " * step)
                self.report(job, step)
        return self.result(job)

    def start(self, job: Any, done: int) -> None:
        """Nothing to restore."""

    def step(self, job: Any) -> None:
        job.model.lm_head.weight.data += 0.01

    def report(self, job: Any, step: int) -> None:
        job.on_step and job.on_step(step, job.settings.max_steps, 1.0)

    def result(self, job: Any) -> TrainingResult:
        return TrainingResult(job.model, (1.0,) * job.settings.max_steps, job.model.lm_head.weight.numel())


def wrong(**members: Any) -> type[RecoveryStrategy]:
    return type("Wrong", (Steady,), members)


def results(**changes: Any) -> type[RecoveryStrategy]:
    return wrong(result=lambda self, job: dataclasses.replace(Steady.result(self, job), **changes))


def steps(change: Any) -> type[RecoveryStrategy]:
    """Whose every step does ``change`` to the output head."""
    return wrong(step=lambda self, job: change(job.model.lm_head))


def twice(self: Any, job: Any, done: int) -> None:
    job.model.lm_head.weight.data += 0.01 * done


def forget(self: Any, job: Any, step: int) -> None:
    (job.work_dir / "steps.txt").unlink()
    Steady.report(self, job, step)


def hide(self: Any, job: Any) -> None:
    """A change that no state dict holds."""
    job.model.lm_head.register_forward_hook(lambda module, args, output: output + 1)
    job.model.lm_head.weight.data += 0.01


def swallow(self: Any, job: Any, step: int) -> None:
    try:
        Steady.report(self, job, step)
    except KeyboardInterrupt:
        return


TALL = torch.nn.Parameter(torch.ones(96, 50))
TRAINS, ORDINARY = "test_it_trains", "test_it_leaves_an_ordinary_checkpoint"
AGAIN, RESUMES = "test_the_same_seed_gives_the_same_model", "test_an_interrupted_run_ends_as_an_uninterrupted_one"
WRONG_STRATEGIES = [
    (NAMED, Steady, r"no installed plugin has this recovery strategy 'steady'.*Steady"),
    (TRAINS, steps(lambda head: None), "one step changes no parameter"),
    (TRAINS, steps(lambda head: head.register_parameter("weight", TALL)), "must keep .* shapes; .* 'lm_head.weight'"),
    (TRAINS, steps(lambda head: head.weight.data[0].fill_(torch.inf)), "not finite in parameter 'lm_head.weight'"),
    (TRAINS, wrong(report=lambda *_: None), r"must call job.on_step\(1, 1, 1\) after its only step; it called \[\]"),
    (TRAINS, results(losses=()), r"returns the losses \(\); expected one finite number"),
    (TRAINS, results(trainable_parameters=0), "reports no trained parameters"),
    (TRAINS, results(model=torch.nn.Linear(1, 1)), "turns a LlamaForCausalLM into a Linear"),
    (ORDINARY, wrong(step=hide), "neither a tensor nor a plain attribute of a module"),
    (AGAIN, steps(lambda head: head.weight.data.add_(torch.rand(1))), "run twice with one seed: .* differs by up to"),
    (RESUMES, wrong(start=twice), "interrupted and run again: parameter 'lm_head.weight' differs by up to 4"),
    (RESUMES, wrong(report=forget), "starts again at step 1 after an interruption; keep its state in job.work_dir"),
    (RESUMES, wrong(report=swallow), "goes on when job.on_step raises KeyboardInterrupt at step 4"),
    (RESUMES, results(losses=(1.0,)), "returns 1 losses of 6 steps"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "cls", "message"), WRONG_STRATEGIES)
def test_a_wrong_strategy_is_caught(tmp_path, check, cls, message):
    with pytest.raises((AssertionError, CheckpointError), match=message):
        run(RecoveryConformance, "strategy", cls, check, *([] if check == NAMED else [tmp_path]))


@pytest.mark.parametrize("check", [TRAINS, ORDINARY, AGAIN, RESUMES])
def test_the_pattern_of_the_wrong_ones_is_right(tmp_path, check):
    run(RecoveryConformance, "strategy", Steady, check, tmp_path)


class WithoutBias(ModelFamily):
    """Forgets that its MLP has biases."""

    name = "without-bias"
    model_types = ("llama",)

    def coupled_groups(self, config):
        return [
            dataclasses.replace(g, spans=tuple(s for s in g.spans if not s.parameter.endswith("up_proj.bias")))
            for g in discover_graph(config).groups
        ]


class FamilyCase(FamilyConformance):
    __test__ = False
    family = WithoutBias

    def config(self):
        sizes = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6}
        return LlamaConfig(**sizes, vocab_size=96, mlp_bias=True)


def test_the_parameter_that_a_family_has_wrong_is_named():
    with pytest.raises(AssertionError, match="mlp: refused"):
        FamilyCase().test_every_cut_equals_silencing()
    with pytest.raises(AssertionError, match=r"mlp\.up_proj\.bias axis 0: nothing; discovery finds 0:40"):
        FamilyCase().test_declared_groups_agree_with_discovery()


@pytest.mark.parametrize(
    "check", ["test_checkpoints_may_name_its_model_class", "test_a_pruned_model_loads_in_fresh_processes"]
)
def test_a_model_class_that_no_entry_point_names_is_noticed(check, tmp_path, monkeypatch):
    def far_away(config, seed):
        model = random_instance(config, seed)
        model.__class__ = type("FarForCausalLM", (type(model),), {"__module__": "far_away.modeling"})
        return model

    monkeypatch.setattr("llmpruner.testing.family.random_instance", far_away)
    written = r'\[project\.entry-points\."llmpruner\.models"\]\nfar_away = "far_away"'
    with pytest.raises(AssertionError, match=written):
        getattr(FamilyCase(), check)(*([tmp_path] if "processes" in check else []))


def test_a_check_that_was_not_possible_is_a_warning(monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "_supports_sdpa", False)
    monkeypatch.setattr(FamilyCase, "family", ModelFamily)
    kinds = "attention, mlp, hidden, vocabulary, layer"
    with pytest.warns(UserWarning, match=f"{kinds}: not checked: sdpa attention: a small llama cannot be built"):
        FamilyCase().test_every_cut_equals_silencing()


def test_a_family_that_names_types_or_a_family_wrongly_is_noticed(monkeypatch):
    for members, message in (
        ({"model_types": "llama"}, "model_types is a text; expected a tuple"),
        ({"extends": "lama"}, "extends 'lama', which is no known family; did you mean llama"),
    ):
        monkeypatch.setattr(FamilyCase, "family", type("Wrong", (WithoutBias,), members))
        with pytest.raises(AssertionError, match=message):
            FamilyCase().test_the_family_recognises_its_configuration()


SETTINGS = [
    (broken(summary=""), "'good' has the summary ''; expected one line"),
    (broken(Settings=Undescribed), "setting 'power' has no description"),
    (broken(Settings=Required), "setting 'power' has no default"),
    (broken(kinds=frozenset({"vocabulary"})), "scores no unit of the model that it is tested on"),
    (broken(needs={"weight"}), r"needs \{'weight'\}; expected a frozenset of Signal"),
    (broken(signed=1), "signed must be True or False"),
]


@pytest.mark.parametrize(("cls", "message"), SETTINGS, ids=range(len(SETTINGS)))
def test_a_registered_criterion_that_says_something_wrong_is_caught(monkeypatch, cls, message):
    catalog = catalog_with(cls)
    monkeypatch.setattr("llmpruner.testing.components.load_catalog", lambda: catalog)
    with pytest.raises(AssertionError, match=message):
        run(CriterionConformance, "criterion", cls, NAMED)
