"""Distillation: losses by hand, targets from a file, what is trained, and the conformance of the strategy."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from recovery_cases import dense_llama, pruned_copy
from torch.nn import functional

from llmpruner.errors import ModelError, SettingsError, UnsupportedModelError
from llmpruner.recovery import distillation
from llmpruner.recovery.base import RecoveryJob
from llmpruner.recovery.distil import DistilStrategy
from llmpruner.recovery.targets import Targets, trained_in
from llmpruner.recovery.trainer import collator_for
from llmpruner.settings import RecoverSettings
from llmpruner.structure.plan import original_layers
from llmpruner.testing import RecoveryConformance
from llmpruner.testing.models import pruned_by, small_job, tiny_llama

SETTINGS = RecoverSettings(
    data="here", batch_size=4, micro_batch_size=2, max_steps=12, learning_rate=5e-3, warmup_steps=0, cutoff=32
)
ROWS = [
    {"input_ids": [(7 * n + 3 * t) % 60 + 3 for t in range(12 + n % 3)], "labels": [-100] * 3 + [5] * (9 + n % 3)}
    for n in range(8)
]


class TestConformance(RecoveryConformance):
    strategy = DistilStrategy


class TestConformanceWithKeptTargets(RecoveryConformance):
    strategy = type(
        "Kept", (DistilStrategy,), {"__init__": lambda self, **s: DistilStrategy.__init__(self, top=9, **s)}
    )

    test_an_entry_point_registers_it = None
    test_its_settings_have_defaults_and_descriptions = None


@pytest.fixture
def dense():
    return dense_llama()


@pytest.fixture
def pruned(dense):
    return pruned_copy(dense)


def job_of(pruned, dense, folder, **changes):
    values = {"settings": SETTINGS, "load_teacher": lambda: copy.deepcopy(dense.model), **changes}
    return RecoveryJob(pruned.model, pruned.tokenizer, ROWS, pruned.graph, work_dir=folder, **values)


def kl(model, dense):
    """Mean KL(dense ‖ model) over the trained tokens of `ROWS`, in nats."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in ROWS:
            ids, trained = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:]) != -100
            log_p, log_q = (m(ids).logits[0, :-1][trained].log_softmax(-1) for m in (dense, model))
            total += float((log_p.exp() * (log_p - log_q)).sum())
            count += int(trained.sum())
    return total / count


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"divergence": "reverse"}, {"divergence": "mixed", "temperature": 2.0}, {"labels": 0.2}, {"hidden": 0.5},
        {"top": 20}, {"trains": "touched"}, {"trains": "lora", "rank": 4},
    ],
    ids=str,
)  # fmt: skip
def test_the_model_comes_nearer_to_the_dense_one(pruned, dense, tmp_path, settings):
    before = kl(pruned.model, dense.model)
    result = DistilStrategy(**settings).train(job_of(pruned, dense, tmp_path))
    assert kl(result.model, dense.model) < 0.9 * before
    assert result.losses[-1] < result.losses[0]
    assert (tmp_path / "teacher.safetensors").exists() == ("top" in settings)


def test_the_loss_is_the_formula(pruned, dense):
    batch = {name: torch.tensor([row[name][:12] for row in ROWS[:2]]) for name in ("input_ids", "labels")}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    trained = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        p, q = (m(batch["input_ids"]).logits[:, :-1][trained] for m in (dense.model, pruned.model))
    for kind in ("forward", "reverse", "mixed"):
        settings = DistilStrategy(temperature=2.0, divergence=kind, labels=0.25).settings
        targets = Targets(dense.model(batch["input_ids"]).logits.detach())
        found = distillation._loss(lambda _: targets, settings, None)(pruned.model, batch)  # noqa: B023
        log_p, log_q = (p / 2).log_softmax(-1), (q / 2).log_softmax(-1)
        forward = functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        reverse = functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        divergence = {"forward": forward, "reverse": reverse, "mixed": (forward + reverse) / 2}[kind]
        next_token = functional.cross_entropy(q, batch["labels"][:, 1:][trained])
        assert float(found.detach()) == pytest.approx(float(0.75 * 4 * divergence + 0.25 * next_token), rel=1e-5)


def test_targets_of_a_file_are_those_of_the_model(pruned, dense, tmp_path):
    """With all tokens kept but one, nothing is lost but half precision; and rows may come in any order."""
    job = job_of(pruned, dense, tmp_path)
    size = dense.model.config.vocab_size
    kept = distillation._targets(job, DistilStrategy(top=size - 1).settings)
    live = distillation._targets(job, DistilStrategy().settings)
    collate = collator_for(job.tokenizer, job.model)
    batch = dict(collate([{**ROWS[n], "row": n} for n in (5, 0, 3)]))
    of_file, wanted = kept(batch), live(batch)
    assert of_file.tokens is not None
    log_p = wanted.logits.flatten(0, 1)[trained_in(batch)[0]].log_softmax(-1)
    torch.testing.assert_close(of_file.log_p, log_p.gather(1, of_file.tokens), atol=5e-3, rtol=1e-3)
    together = distillation._with_rest(of_file.log_p)
    assert together.shape == log_p.shape
    torch.testing.assert_close(together.exp().sum(-1), torch.ones(len(together)), atol=1e-2, rtol=0)


def test_a_class_that_names_no_head_has_as_many_predictions_as_embeddings(pruned, dense, tmp_path, monkeypatch):
    monkeypatch.setattr(type(dense.model), "get_output_embeddings", lambda model: None)
    result = DistilStrategy(top=5).train(job_of(pruned, dense, tmp_path))
    assert result.losses[-1] < result.losses[0]
    monkeypatch.undo()
    dense.model.resize_token_embeddings(dense.model.config.vocab_size + 8)
    with pytest.raises(ModelError, match=r"predicts \d+ tokens, the pruned one \d+: no distillation"):
        DistilStrategy().train(job_of(pruned, dense, tmp_path / "other"))


def test_the_dense_model_is_not_in_memory_after_its_predictions_are_kept(pruned, dense, tmp_path):
    seen = []

    def load_teacher():
        teacher = copy.deepcopy(dense.model)
        seen.append(weakref.ref(teacher))
        return teacher

    def on_step(number, total, loss):
        gc.collect()
        seen.append(seen[0]())

    job = job_of(pruned, dense, tmp_path, load_teacher=load_teacher, on_step=on_step)
    DistilStrategy(top=5).train(job)
    assert len(seen) == 1 + SETTINGS.max_steps and seen[1:] == [None] * SETTINGS.max_steps


def test_the_dense_model_computes_as_the_settings_say(pruned, dense, tmp_path):
    """In bfloat16 as the pruned one: in float32 it would take longer than the training itself."""
    dtypes = []

    def load_teacher():
        teacher = copy.deepcopy(dense.model)
        teacher.lm_head.register_forward_hook(lambda _, __, logits: dtypes.append(logits.dtype))
        return teacher

    for settings in ({}, {"top": 5}):
        folder = tmp_path / str(settings)
        folder.mkdir()
        job = job_of(
            pruned, dense, folder, load_teacher=load_teacher,
            settings=SETTINGS.model_copy(update={"autocast": True, "max_steps": 1}),
        )  # fmt: skip
        DistilStrategy(**settings).train(job)
    assert dtypes and set(dtypes) == {torch.bfloat16}


def test_only_what_the_cut_touched_is_trained(pruned, dense, tmp_path):
    before = {name: p.clone() for name, p in pruned.model.named_parameters()}
    result = DistilStrategy(trains="touched").train(job_of(pruned, dense, tmp_path))
    changed = {n for n, p in result.model.named_parameters() if not torch.equal(p, before[n])}
    dense_shapes = {n: p.shape for n, p in dense.model.named_parameters()}
    assert changed == {n for n, p in before.items() if p.shape != dense_shapes[n]}
    assert result.trainable_parameters == sum(before[name].numel() for name in changed)


def test_layers_are_matched_after_layers_were_removed(gqa, tmp_path):
    dense = replace(gqa, model=copy.deepcopy(gqa.model))
    pruned = pruned_by(gqa, small_job(kinds=("layer",), amount=0.25, layers="1"))
    assert original_layers(pruned.plans) == (0, 2, 3)
    with pytest.raises(UnsupportedModelError, match="changed the shape of no weight"):
        DistilStrategy(trains="touched").train(job_of(pruned, dense, tmp_path, layers=(0, 2, 3)))
    wanted = tuple(torch.randn(2, 5, 4) for _ in range(5))
    found = wanted[0], wanted[1], wanted[3], wanted[4]
    batch = {"attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    assert float(distillation._difference(wanted, found, batch, (0, 2, 3))) == 0
    assert float(distillation._difference(wanted, found, batch, None)) > 0.1


def test_what_cannot_be_distilled_is_refused(gqa, tmp_path):
    dense = replace(gqa, model=copy.deepcopy(gqa.model))
    pruned = replace(pruned_by(gqa, small_job(kinds=("hidden",))), tokenizer=tiny_llama().tokenizer)
    with pytest.raises(UnsupportedModelError, match="different sizes"):
        DistilStrategy(hidden=1.0).train(job_of(pruned, dense, tmp_path / "one"))
    with pytest.raises(SettingsError, match="hidden needs the dense model in every step; give either it or top"):
        DistilStrategy(hidden=1.0, top=4)
    for name, value in (("rank", 4), ("alpha", 8), ("dropout", 0.1), ("rslora", True), ("dora", True)):
        with pytest.raises(SettingsError, match=f"{name} has no effect with trains=touched"):
            DistilStrategy(trains="touched", **{name: value})
        assert DistilStrategy(trains="lora", **{name: value}).adapters
    with pytest.raises(SettingsError, match="recovery strategy distil: labels = 1"):
        DistilStrategy(labels=1)
