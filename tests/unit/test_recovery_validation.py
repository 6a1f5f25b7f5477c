"""Validation: which examples are held back, what is measured, which weights are the result, and when training stops."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import tiny_models
import torch
from llmpruner_llama.family import LlamaFamily

from llmpruner import DataError, ModelError, SettingsError
from llmpruner.calibration.chat import TrainingText, Turn
from llmpruner.discovery.groups import build_graph
from llmpruner.recovery.base import RecoveryJob, RecoveryStrategy, TrainingResult
from llmpruner.recovery.distil import DistilStrategy
from llmpruner.recovery.examples import Examples, split, tokenise
from llmpruner.recovery.full import FullStrategy
from llmpruner.recovery.lora import LoraStrategy
from llmpruner.recovery.run import recover
from llmpruner.recovery.training import fit, latest_checkpoint
from llmpruner.recovery.training_data import prepare
from llmpruner.recovery.watching import Watch
from llmpruner.settings import RecoverSettings

FAMILY = LlamaFamily()
EXAMPLES = Examples(
    tuple(TrainingText((Turn(f"Question {n}: what is it?\n", f"It is {n * n} or so."),)) for n in range(20)), "here"
)
SETTINGS = RecoverSettings(
    data="here", batch_size=4, micro_batch_size=2, max_steps=6, learning_rate=5e-3, warmup_steps=0, cutoff=48,
    validation=5, eval_steps=2,
)  # fmt: skip


def run(folder, strategy=None, settings=SETTINGS, **options):
    pytest.importorskip("peft")
    model, tokenizer = tiny_models.llama(), tiny_models.tokenizer()
    data = prepare(settings, FAMILY, tokenizer, EXAMPLES)
    graph = build_graph(FAMILY, model.config)
    return recover(model, tokenizer, graph, data, strategy or FullStrategy(), settings, folder, **options)


def many(count, source="a.jsonl"):
    texts = tuple(TrainingText((Turn("", f"text {n}"),)) for n in range(count))
    return Examples(texts, source)


@pytest.mark.parametrize(
    ("records", "asked", "held_out"),
    [(1000, 0.05, 50), (1000, 0.001, 16), (10_000, 0.02, 128), (79, 0.02, 0), (80, 0.02, 16), (20, 3, 3), (20, 0, 0)],
)
def test_a_share_is_bounded_and_a_number_exact(records, asked, held_out):
    kept, out = split(many(records), asked, seed=0)
    assert (0 if out is None else len(out.texts)) == held_out
    assert len(kept.texts) == records - held_out
    if out is not None:
        assert set(kept.texts).isdisjoint(out.texts) and set(kept.texts) | set(out.texts) == set(many(records).texts)


def test_the_draw_follows_the_seed():
    drawn = [split(many(100), 20, seed)[1].texts for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_texts_of_one_record_stay_together():
    places = tuple(f"a.jsonl, line {n // 2}" for n in range(40))
    kept, out = split(replace(many(40), places=places), 5, seed=0)
    assert len(out.texts) == 10
    assert set(kept.places).isdisjoint(out.places)


def test_nothing_left_to_train_on_is_refused():
    with pytest.raises(DataError, match=r"a\.jsonl has 4 examples, and --validation takes 4 of them"):
        split(many(4), 4, seed=0)


def test_validation_is_measured_on_rows_that_are_not_trained_on(tmp_path):
    seen = []
    result = run(tmp_path, on_validation=seen.append)
    assert [one.step for one in result.validation] == [0, 2, 4, 6] and seen == list(result.validation)
    assert (result.examples, result.validation_examples) == (15, 5)
    out = split(EXAMPLES, 5, 0)[1]
    rows = tokenise(out, tiny_models.tokenizer(), cutoff=48, loss_on="all")
    model = tiny_models.llama()
    for one, subject in ((result.validation[0], model), (min(seen, key=lambda v: v.loss), result.model)):
        total = count = 0.0
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            with torch.no_grad():
                total += float(subject(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        assert one.loss == pytest.approx(total / count, abs=1e-5)
        assert one.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
    record = result.record()
    assert record["validation"][0] == {"step": 0, "loss": seen[0].loss, "perplexity": seen[0].perplexity}
    assert record["best_step"] == min(seen, key=lambda one: one.loss).step


def test_validation_does_not_change_the_training(tmp_path):
    """Dropout is drawn alike, whether or not there are validations in between."""
    strategy = LoraStrategy(dropout=0.3)
    often, seldom = (
        run(tmp_path / str(n), strategy, SETTINGS.model_copy(update={"eval_steps": n})).losses for n in (1, 6)
    )
    assert often == seldom


class Scripted(RecoveryStrategy):
    """Adds one to a weight at every step; the validation loss after n steps is ``losses[n]``. ``start``: the step from
    which it continues."""

    name = "scripted"
    losses = (5.0, 4.0, 1.0, 3.0, 2.0, 2.5, 2.75)

    def __init__(self, start=0):
        super().__init__()
        self.steps, self.weights = start, {}

    def train(self, job):
        weight = job.model.lm_head.weight
        job.model.requires_grad_(False)
        weight.requires_grad_(True)

        def loss(model, batch):
            if torch.is_grad_enabled():
                return weight.sum() * 0 + 1
            self.weights[self.steps] = weight.detach().clone()
            return torch.tensor(self.losses[self.steps])

        def on_step(step, total, value):
            self.steps = step
            with torch.no_grad():
                weight.add_(1)
            job.on_step(step, total, value)

        return TrainingResult(job.model, fit(job.model, replace(job, on_step=on_step), loss), weight.numel())


def scripted(folder, on_step=lambda *_: None, start=0, **changes):
    strategy = Scripted(start)
    settings = SETTINGS.model_copy(update={"eval_steps": 1, "learning_rate": 1e-9, **changes})
    return strategy, run(folder, strategy, settings, on_step=on_step)


def test_the_result_has_the_weights_with_the_lowest_loss(tmp_path):
    strategy, result = scripted(tmp_path)
    assert [one.loss for one in result.validation] == list(Scripted.losses)
    assert result.best_step == 2 and len(result.losses) == 6
    torch.testing.assert_close(result.model.lm_head.weight, strategy.weights[2], atol=1e-6, rtol=0)
    assert "the validation loss was lowest after step 2; the result has the weights of then" in result.notes
    assert all(one.perplexity is None for one in result.validation)


def test_training_stops_after_validations_without_a_lower_loss(tmp_path):
    strategy, result = scripted(tmp_path, patience=2)
    assert [one.step for one in result.validation] == [0, 1, 2, 3, 4] and len(result.losses) == 4
    torch.testing.assert_close(result.model.lm_head.weight, strategy.weights[2], atol=1e-6, rtol=0)
    assert "stopped after step 4: 2 validations without a lower loss" in result.notes


def test_a_training_is_validated_after_its_last_step(tmp_path):
    result = scripted(tmp_path, eval_steps=4)[1]
    assert [one.step for one in result.validation] == [0, 4, 6]


@pytest.mark.parametrize(("patience", "last"), [(None, 5), (2, 3)])
def test_no_checkpoint_is_written_where_a_training_ends(tmp_path, monkeypatch, patience, last):
    """It would be read by no one, and is as large as the model and its optimizer's state."""
    saved, real = [], Watch.on_save

    def on_save(watch, args, state, control, **given):
        saved.append(state.global_step)
        real(watch, args, state, control, **given)

    monkeypatch.setattr(Watch, "on_save", on_save)
    scripted(tmp_path, patience=patience)
    assert saved == list(range(1, last + 1))


@pytest.mark.parametrize("stop", [3, 4])
def test_best_weights_and_patience_outlive_an_interruption(tmp_path, stop):
    whole = scripted(tmp_path / "whole", patience=2)[1]

    def interrupt(step, *_):
        if step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scripted(tmp_path / "parts", interrupt, patience=2)
    assert latest_checkpoint(tmp_path / "parts").endswith(f"checkpoint-{stop - 1}")

    resumed = scripted(tmp_path / "parts", start=stop - 1, patience=2)[1]
    assert resumed.validation == whole.validation and resumed.losses == whole.losses
    torch.testing.assert_close(resumed.model.lm_head.weight, whole.model.lm_head.weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("saves", [False, True])
def test_no_more_than_two_of_the_best_weights_are_kept(tmp_path, monkeypatch, saves):
    """Each is as large as all that is trained. Between two checkpoints, validations may go on getting better."""
    monkeypatch.setattr(
        "llmpruner.recovery.trainer.LossTrainer.worth_saving", lambda one: saves and one.state.global_step == 2
    )
    monkeypatch.setattr(Scripted, "losses", (5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.75))
    kept = []
    strategy, result = scripted(tmp_path, lambda *_: kept.append({file.name for file in tmp_path.glob("best-*")}))
    names = [{f"best-{step}.safetensors" for step in steps} for steps in ([0], [1], [2], [3], [4], [5])]
    if saves:
        names[3:] = [one | names[2] for one in names[3:]]
    assert kept == names
    torch.testing.assert_close(result.model.lm_head.weight, strategy.weights[5], atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("top", [0, 7])
def test_distillation_validates_on_its_own_loss(tmp_path, top):
    dense = tiny_models.llama(seed=4)
    strategy = DistilStrategy(top=top)
    result = run(tmp_path, strategy, load_teacher=lambda: dense)
    model = tiny_models.llama()
    total = count = 0.0
    for row in tokenise(split(EXAMPLES, 5, 0)[1], tiny_models.tokenizer(), cutoff=48, loss_on="all"):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log_p, log_q = (m(ids).logits[0, :-1].log_softmax(-1) for m in (dense, model))
        if top:
            kept = log_p.topk(top).indices
            log_p, log_q = (
                torch.cat([x.gather(1, kept), (1 - x.gather(1, kept).exp().sum(-1, keepdim=True)).log()], 1)
                for x in (log_p, log_q)
            )
        total += float((log_p.exp() * (log_p - log_q)).sum())
        count += ids.shape[1] - 1
    assert result.validation[0].loss == pytest.approx(total / count, rel=1e-2 if top else 1e-4)
    assert result.validation[0].perplexity is None
    assert result.validation[-1].loss < result.validation[0].loss


def test_a_strategy_that_does_not_validate_is_named(tmp_path):
    class Silent(RecoveryStrategy):
        name = "silent"

        def train(self, job):
            return TrainingResult(job.model, (), 0)

    assert "recovery strategy silent measures no validation loss" in run(tmp_path, Silent()).notes[0]


def test_too_few_examples_are_said(tmp_path):
    settings = SETTINGS.model_copy(update={"validation": 0.1, "max_steps": 1, "eval_steps": None})
    result = run(tmp_path, FullStrategy(), settings)
    assert result.notes == ("20 examples are too few to hold some back: no validation",)
    assert result.examples == 20 and result.best_step is None


def job_of(folder, settings=SETTINGS, **changes):
    model = tiny_models.llama()
    rows = tokenise(EXAMPLES, tiny_models.tokenizer(), cutoff=48, loss_on="all")
    graph = build_graph(FAMILY, model.config)
    return RecoveryJob(model, tiny_models.tokenizer(), rows, graph, settings, folder, **changes)


def test_a_loss_that_is_not_finite_names_step_and_rows(tmp_path):
    job = job_of(tmp_path, places=[f"a.jsonl, line {n + 1}" for n in range(20)])

    def loss(model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits.square().mean() * (float("nan") if 7 in batch["row"].tolist() else 1.0)

    with pytest.raises(ModelError, match=r"the loss became nan at step \d, with the rows [\d, ]+ of the data") as found:
        fit(job.model, job, loss)
    text = str(found.value)
    assert "a.jsonl, line 8" in text and text.count("a.jsonl") == 2, "the two rows of the micro-batch"
    assert "look at them, lower the learning rate" in text


def test_a_validation_loss_that_is_not_finite_stops(tmp_path):
    job = job_of(tmp_path)
    job = replace(job, examples=job.examples[:15], validation=job.examples[15:])

    def loss(model, batch):
        value = model(input_ids=batch["input_ids"]).logits.square().mean()
        return value if torch.is_grad_enabled() else value * float("inf")

    with pytest.raises(ModelError, match="the validation loss became inf at step 0"):
        fit(job.model, job, loss)


def test_a_warm_up_as_long_as_the_training_is_refused(tmp_path):
    settings = SETTINGS.model_copy(update={"warmup_steps": 6})
    with pytest.raises(SettingsError, match="--warmup-steps 6: the training has 6 steps"):
        run(tmp_path, FullStrategy(), settings)


def test_schedules_and_weight_decay(tmp_path):
    rates = {}
    for schedule in ("linear", "cosine", "constant"):
        settings = SETTINGS.model_copy(
            update={"schedule": schedule, "warmup_steps": 2, "validation": 0, "eval_steps": None}
        )
        run(tmp_path / schedule, FullStrategy(), settings)
        state = json.loads(
            (tmp_path / schedule / latest_checkpoint(tmp_path / schedule) / "trainer_state.json").read_text()
        )
        rates[schedule] = [entry["learning_rate"] / 5e-3 for entry in state["log_history"] if "loss" in entry]
    assert rates["linear"] == pytest.approx([0, 0.5, 1, 0.75, 0.5])
    assert rates["cosine"] == pytest.approx([0, 0.5, *((1 + math.cos(math.pi * n / 4)) / 2 for n in range(3))])
    assert rates["constant"] == pytest.approx([0, 0.5, 1, 1, 1])
    plain, decayed = (
        run(tmp_path / str(decay), FullStrategy(), SETTINGS.model_copy(update={"weight_decay": decay, "validation": 0}))
        for decay in (0.0, 0.5)
    )
    weights = [dict(result.model.named_parameters()) for result in (plain, decayed)]
    name = "model.layers.0.mlp.up_proj.weight"
    assert weights[1][name].norm() < weights[0][name].norm()
