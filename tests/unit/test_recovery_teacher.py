"""Recovery with a loss of its own and the dense model as a teacher, as an outside package writes it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from llmpruner_llama.family import LlamaFamily

import llmpruner
from llmpruner import LoadSettings, ModelError, OutputError, fit
from llmpruner.calibration.chat import TrainingText, Turn
from llmpruner.discovery.dense import dense_structure, load_dense
from llmpruner.discovery.groups import build_graph
from llmpruner.discovery.structure import load_structure
from llmpruner.errors import SettingsError
from llmpruner.models.opening import load_model
from llmpruner.models.surgery import cut
from llmpruner.recipes.saving import save
from llmpruner.recovery.base import RecoveryJob
from llmpruner.recovery.examples import Examples, tokenise
from llmpruner.recovery.run import recover
from llmpruner.recovery.training_data import prepare
from llmpruner.settings import RecoverSettings
from llmpruner.testing import RecoveryConformance, catalog_with

PACKAGE = Path(__file__).parents[1] / "packages" / "llmpruner-distil"
SETTINGS = RecoverSettings(
    data="here", batch_size=4, micro_batch_size=2, max_steps=2, learning_rate=5e-3, warmup_steps=0, cutoff=48
)
EXAMPLES = Examples(
    tuple(TrainingText((Turn(f"Question {n}?\n", "Paris. " * (n % 4 + 1)),)) for n in range(12)), SETTINGS.data
)


def dense_model():
    """A tiny LLaMA with weights large enough for a cut to change its predictions."""
    model = tiny_models.llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() == 2 else 1)
    return model


@pytest.fixture(scope="module")
def distil():
    sys.path.insert(0, str(PACKAGE))
    import llmpruner_distil

    yield llmpruner_distil
    sys.path.remove(str(PACKAGE))
    sys.modules.pop("llmpruner_distil")


@pytest.fixture(scope="module")
def catalog(distil):
    return catalog_with(distil, entry_points=True)


@pytest.fixture
def pruned(tmp_path, monkeypatch, catalog):
    """A tiny model, pruned from a folder ``dense`` that was named by a relative path, and loaded from elsewhere."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir(), elsewhere.mkdir()
    dense_model().save_pretrained(home / "dense")
    tiny_models.tokenizer().save_pretrained(home / "dense")
    monkeypatch.chdir(home)
    prune(catalog, "dense", home / "pruned")
    monkeypatch.chdir(elsewhere)
    return load_model(
        load_structure("../home/pruned", catalog), catalog
    )  # from ``elsewhere``, where there is no folder ``dense``


def prune(catalog, source, target):
    llmpruner.prune(source, ratio=0.2, importance="l1", output=target, catalog=catalog)


def run(loaded, catalog, strategy, work_dir, settings=SETTINGS, **options):
    data = prepare(settings, loaded.family, loaded.tokenizer, EXAMPLES)
    return recover(
        loaded.model, loaded.tokenizer, loaded.graph, data, strategy, settings, work_dir,
        **{"load_teacher": lambda: load_dense(loaded, catalog), **options},
    )  # fmt: skip


def divergence(model, teacher):
    """Mean KL over the answers' tokens, in nats."""
    rows = tokenise(EXAMPLES, tiny_models.tokenizer(), cutoff=48, loss_on="all")
    found = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            student, dense = (m(ids).logits[0, :-1].log_softmax(-1) for m in (model, teacher))
            found.append((dense.exp() * (dense - student)).sum(-1))
    return float(torch.cat(found).mean())


def test_an_outside_strategy_distils_from_the_dense_model_and_is_recorded(pruned, catalog, tmp_path):
    dense = load_model(load_structure(str(tmp_path / "home" / "dense"), catalog), catalog).model
    before = divergence(pruned.model, dense)
    result = run(pruned, catalog, catalog.strategies["imitation"](temperature=1.0), tmp_path / "work")
    assert divergence(result.model, dense) < before
    record = result.record()
    assert record["strategy"] == "imitation" and record["strategy_settings"] == {"temperature": 1.0}
    save(replace(pruned, model=result.model), tmp_path / "saved", notes={"recovery": [record]})
    kept = json.loads((tmp_path / "saved" / "llmpruner.json").read_text())
    assert kept["recovery"] == [record]
    assert kept["base_path"] == str(tmp_path / "home" / "dense")


@pytest.mark.slow
def test_an_interrupted_distillation_ends_as_an_uninterrupted_one(pruned, catalog, tmp_path):
    again = load_model(load_structure(pruned.ref, catalog), catalog)
    settings = SETTINGS.model_copy(update={"max_steps": 4})
    distil = catalog.strategies["imitation"]
    whole = run(pruned, catalog, distil(), tmp_path / "whole", settings)

    def interrupt(step, total, loss):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(again, catalog, distil(), tmp_path / "parts", settings, on_step=interrupt)
    again = load_model(load_structure(pruned.ref, catalog), catalog)
    with pytest.raises(OutputError, match=r"another recovery job \(strategy settings differ\)"):
        run(again, catalog, distil(temperature=3.0), tmp_path / "parts", settings)
    steps = []
    resumed = run(again, catalog, distil(), tmp_path / "parts", settings, on_step=lambda step, *_: steps.append(step))
    assert steps[0] > 1 and resumed.losses == whole.losses
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=1e-6, rtol=0)


def test_settings_of_a_strategy_are_checked(catalog):
    with pytest.raises(
        SettingsError, match="strategy imitation: temperature = 0 is refused: expected a number above 0"
    ):
        catalog.strategies["imitation"](temperature=0)
    with pytest.raises(SettingsError, match="recovery strategy full has no setting 'rank'; it has: float32"):
        catalog.strategies["full"](rank=4)
    with pytest.raises(SettingsError, match="recovery strategy lora: rank = 0 is refused: expected at least 1"):
        catalog.strategies["lora"](rank=0)


@pytest.fixture
def conforming(distil):
    return type("Case", (RecoveryConformance,), {"strategy": distil.Distil})()


@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    [name for name in vars(RecoveryConformance) if name.startswith("test_") and "entry_point" not in name],
)
def test_an_outside_strategy_conforms(conforming, check, tmp_path):
    method = getattr(conforming, check)
    method(tmp_path) if method.__code__.co_argcount > 1 else method()


def test_the_teacher_is_loaded_once_and_only_on_request(pruned, tmp_path):
    teacher = tiny_models.llama()
    loads = []

    def load():
        loads.append(1)
        return teacher.train()

    job = RecoveryJob(
        pruned.model.bfloat16(), pruned.tokenizer, [], pruned.graph, SETTINGS, tmp_path, load_teacher=load
    )
    assert not loads
    assert job.teacher() is job.teacher() and len(loads) == 1
    assert not job.teacher().training and job.teacher().dtype == torch.bfloat16
    assert not any(p.requires_grad for p in job.teacher().parameters())


def test_a_job_without_a_dense_model_is_an_error(pruned, catalog, tmp_path):
    with pytest.raises(ModelError, match="needs the dense model, which is not known here"):
        run(pruned, catalog, catalog.strategies["imitation"](), tmp_path / "work", load_teacher=None)


def test_the_dense_model_is_found_from_any_folder_by_its_dtype_and_structure(pruned, catalog, tmp_path):
    dense = load_dense(pruned, catalog)
    expected = dense_model().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in dense.state_dict().items())
    half = load_model(load_structure(pruned.ref, catalog), catalog, LoadSettings(dtype="bfloat16"))
    assert load_dense(half, catalog).dtype == torch.bfloat16


def test_the_dense_model_of_a_model_pruned_twice_is_the_first(pruned, catalog, tmp_path):
    prune(catalog, pruned.ref, tmp_path / "twice")
    twice = load_model(load_structure(str(tmp_path / "twice"), catalog), catalog)
    assert len(twice.plans) == 2
    assert load_dense(twice, catalog).config.intermediate_size == 48


def test_a_dense_model_of_the_same_shapes_with_other_weights_is_warned_of(pruned, catalog, tmp_path, caplog):
    dense_structure(pruned, catalog)
    assert caplog.text == ""
    tiny_models.llama(seed=5).save_pretrained(tmp_path / "home" / "dense")
    dense_structure(pruned, catalog)
    assert "home/dense' are not those from which '../home/pruned' was pruned: another model" in caplog.text


def test_a_dense_model_that_is_gone_or_another_is_refused(pruned, catalog, tmp_path, monkeypatch):
    dense = tmp_path / "home" / "dense"
    dense.rename(tmp_path / "elsewhere" / "dense")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ModelError, match=r"was pruned from, 'dense', cannot be opened \(nothing is at .*home/dense now"
    ):
        load_dense(pruned, catalog)
    # By the reference as it was given, too.
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_dense(pruned, catalog).config.intermediate_size == 48
    tiny_models.llama(layers=3).save_pretrained(dense)
    with pytest.raises(ModelError, match=r"is another model now: parameters of '.*home/dense' differ in name or shape"):
        load_dense(pruned, catalog)
    with pytest.raises(ModelError, match="was not pruned by llmpruner"):
        load_dense(load_model(load_structure(str(dense), catalog), catalog), catalog)


def next_token_loss(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:])


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_loss_of_ones_own_is_the_mean_over_the_tokens_of_the_step(tmp_path, micro):
    """The model's own loss, written by hand, trains alike, although micro batches differ in tokens."""

    settings = SETTINGS.model_copy(update={"micro_batch_size": micro, "loss_on": "answers"})
    results = []
    for name, loss in (("own", None), ("by hand", next_token_loss)):
        model = tiny_models.llama()
        graph = build_graph(LlamaFamily(), model.config)
        graph = cut(model, graph, {"layers.0.mlp": range(30)}, LlamaFamily())
        rows = tokenise(EXAMPLES, tiny_models.tokenizer(), cutoff=48, loss_on="answers")
        job = RecoveryJob(model, tiny_models.tokenizer(), rows, graph, settings, tmp_path / name)
        results.append((fit(model, job, loss), model.state_dict()))
    (own, weights), (by_hand, others) = results
    assert by_hand == pytest.approx(own, abs=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, atol=1e-5, rtol=0)
