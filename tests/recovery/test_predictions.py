"""The dense model's predictions, read once: what is kept of them, the same loss in expectation, the same files however
they are made, and no second reading."""

from dataclasses import replace

import pytest
import tiny_models
import torch
from recovery_cases import dense_model, model_of, pruned_model, train_tiny, write_lines
from said import Killed, Said, StopAt

import llmpruner
from llmpruner import OutputError
from llmpruner.engine.ranks import SINGLE, Ranks
from llmpruner.models import numbers
from llmpruner.models.opening import load_model, open_streamed
from llmpruner.progress import QUIET
from llmpruner.recovery import predictions as kept
from llmpruner.recovery.base import RecoveryJob
from llmpruner.recovery.losses import distillation_loss
from llmpruner.recovery.predictions import Predictions
from llmpruner.recovery.strategies import DistilStrategy
from llmpruner.settings import LoadSettings, RecoverSettings

ROWS = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for n in range(9) if (ids := list(range(3 + n, 12 + 6 * n)))]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few tokens of 300 are kept; files of four rows, batches of two or three; products in float32 on any processor."""
    for name, value in {"TOP": 12, "DRAWN": 6, "_SHARD": 4, "_LOGITS": 300 * 100, "_ELEMENTS": 300 * 10}.items():
        monkeypatch.setattr(kept, name, value)
    monkeypatch.setattr(numbers, "multiplies_bfloat16_fast", lambda kind: False)


def made(folder, rows=ROWS, seed=0, dense=None, network=None, ranks=SINGLE, progress=QUIET):
    folder.mkdir(exist_ok=True)
    dense = dense or model_of(dense_model())
    predictions = Predictions(rows, seed, folder, ["dense"])
    predictions.make(lambda: (dense, network or dense.network), ranks, progress)
    return predictions


def batch_of(*rows, before=0, after=0):
    """Padded, with more padding on both sides."""
    length = max(len(row["input_ids"]) for row in rows)
    pads = [(before, after + length - len(row["input_ids"])) for row in rows]
    names = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    values = ({**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows)
    padded = [
        {n: [p] * a + row[n] + [p] * b for n, p in names.items()} for row, (a, b) in zip(values, pads, strict=True)
    ]
    return {name: torch.tensor([row[name] for row in padded]) for name in names}


def bytes_in(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_likeliest_tokens_are_those_of_the_dense_model(tmp_path):
    """Beside longer rows in a batch, too: padding changes no prediction."""
    predictions, model = made(tmp_path), dense_model()
    for row in ROWS:
        tokens, weights, information = predictions.of(batch_of(row, before=2, after=3))
        with torch.no_grad():
            p = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].softmax(-1)
        top, ids = p.topk(12)
        assert torch.equal(tokens[:, :12], ids)
        torch.testing.assert_close(weights[:, :12], top, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(weights[:, 12:], ((1 - top.sum(1)) / 6)[:, None].expand(-1, 6), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(weights.sum(1), torch.ones(len(p)))
        torch.testing.assert_close(information, torch.xlogy(p, p).sum(1))
        assert all(not {*row[:12]} & {*row[12:]} for row in tokens.tolist()), "what is drawn is of the rest"
    of_both = predictions.of(batch_of(ROWS[3], ROWS[1]))
    for part, *of_each in zip(
        of_both, predictions.of(batch_of(ROWS[3])), predictions.of(batch_of(ROWS[1])), strict=True
    ):
        assert torch.equal(part, torch.cat(of_each))


def test_the_loss_and_its_gradient_are_right_in_expectation(tmp_path):
    rows, dense, (model, graph) = ROWS[1:3], model_of(dense_model()), pruned_model()
    teacher = dense.network.requires_grad_(False)
    job = RecoveryJob(model, None, [], [], graph, RecoverSettings(), tmp_path, lambda: teacher)

    def found(job):
        """The loss and its gradient."""
        loss = distillation_loss(job, 0.0)(model, batch_of(*rows))
        return loss.detach(), *torch.autograd.grad(loss, model.lm_head.weight)

    exact, gradient = found(job)

    def errors(seeds):
        """Of the means over ``seeds``, in proportion."""
        each = [found(replace(job, predictions=made(tmp_path / "many", rows, seed, dense))) for seed in seeds]
        loss, mean = (torch.stack(values).mean(0) for values in zip(*each, strict=True))
        return abs(float(loss / exact - 1)), float((mean - gradient).norm() / gradient.norm())

    (_, of_one), (difference, of_many) = errors([0]), errors(range(100))
    assert difference < 0.1 and of_many < of_one / 7


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    dense_model().save_pretrained(home / "dense")
    tiny_models.tokenizer().save_pretrained(home / "dense")
    (home / "text.txt").write_text(tiny_models.TEXT)
    llmpruner.prune(home / "dense", output=home / "pruned", ratio=0.2, importance="l1", compensate="none")
    llmpruner.prune(
        home / "dense", output=home / "trimmed", kinds="vocabulary", settings={"vocabulary": {"tokens": 280}},
        calibration=str(home / "text.txt"), samples=4, length=32,
    )  # fmt: skip
    write_lines(home / "data.jsonl")
    return home


class Apart(Ranks):
    """A process of two that never meets the other; no file is there at their start."""

    def from_first(self, make):
        return [0, 1, 2]

    def wait(self):
        pass


def test_files_are_the_same_however_they_are_made(home, tmp_path, monkeypatch):
    """In memory, layer by layer, by two processes, and in two parts."""
    structure = llmpruner.discover(home / "dense")
    resident = load_model(structure, LoadSettings())
    made(tmp_path / "resident", dense=resident)
    whole = bytes_in(tmp_path / "resident")
    assert len(whole) == 3
    streamed = open_streamed(structure, LoadSettings())
    made(tmp_path / "streamed", dense=streamed)
    monkeypatch.setattr(kept, "_STREAMED_TOKENS", 60)
    made(tmp_path / "in parts", dense=streamed)
    for number in range(2):
        made(tmp_path / "shared", dense=resident, ranks=Apart(number, 2))
        assert len(bytes_in(tmp_path / "shared")) == (2, 3)[number]
    run = kept._run

    def until_a_file_is_there(*inputs):
        if bytes_in(tmp_path / "killed"):
            raise Killed
        return run(*inputs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(kept, "_run", until_a_file_is_there)
        made(tmp_path / "killed", dense=resident)
    assert len(bytes_in(tmp_path / "killed")) == 1
    made(tmp_path / "killed", dense=resident)
    for name in ("streamed", "in parts", "shared", "killed"):
        assert bytes_in(tmp_path / name) == whole, name


def test_tokens_of_a_trimmed_model(home, tmp_path):
    """The dense model says them as it does while training, in memory and layer by layer."""
    trimmed, dense = llmpruner.load(home / "trimmed"), llmpruner.discover(home / "dense")
    ids = trimmed.tokenizer(tiny_models.TEXT[:200], add_special_tokens=False)["input_ids"]
    rows = [{"input_ids": part, "labels": part} for part in (ids[:40], ids[40:60], ids[60:])]
    resident, streamed = load_model(dense, LoadSettings()), open_streamed(dense, LoadSettings())
    teacher = resident.teacher_of(llmpruner.discover(home / "trimmed"), trimmed.tokenizer)
    predictions = made(tmp_path / "resident", rows, dense=resident, network=teacher)
    with streamed.weights.outside():
        network = streamed.teacher_of(trimmed, trimmed.tokenizer)
    made(tmp_path / "streamed", rows, dense=streamed, network=network)
    assert bytes_in(tmp_path / "streamed") == bytes_in(tmp_path / "resident")
    tokens, weights, _ = predictions.of(batch := batch_of(rows[1]))
    with torch.no_grad():
        p = teacher(batch["input_ids"], batch["attention_mask"]).logits[0, :-1].softmax(-1)
    assert p.shape[1] < 300 and int(tokens.max()) < p.shape[1]
    torch.testing.assert_close(weights[:, :12], p.gather(1, tokens[:, :12]), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("labels", [0.0, 0.25])
def test_with_all_tokens_it_trains_as_beside_the_dense_model(tmp_path, monkeypatch, labels):
    monkeypatch.setattr(kept, "TOP", 1000)
    monkeypatch.setattr(kept, "STORED", torch.float32)
    strategy = DistilStrategy(labels=labels)
    beside = train_tiny(tmp_path / "beside", strategy)
    read_once = train_tiny(tmp_path / "once", strategy, predictions=lambda rows: made(tmp_path / "kept", rows))
    assert read_once.losses == pytest.approx(beside.losses, abs=1e-5)
    validations = ([each["loss"] for each in result.record["validation"]] for result in (read_once, beside))
    assert next(validations) == pytest.approx(next(validations), abs=1e-5)


def recover(home, output, progress=None, **options):
    values = {"max_steps": 12, "batch_size": 4, "cutoff": 24, "learning_rate": 1e-3, **options}
    data = str(home / "data.jsonl")
    return llmpruner.recover(home / "pruned", data=data, output=output, progress=progress or QUIET, **values)


def test_a_killed_training_does_not_read_the_dense_model_again(home, tmp_path, monkeypatch):
    whole = recover(home, tmp_path / "whole")
    with pytest.raises(Killed):
        recover(home, tmp_path / "out", progress=StopAt("Recovering, step 9"))
    (files := list((tmp_path / "out.recovery").glob("predictions-*"))) and files[0].touch()
    with monkeypatch.context() as patch:
        patch.setattr("llmpruner.recovery.dense.load_model", lambda *_: pytest.fail("loaded"))
        again = recover(home, tmp_path / "out")
    assert files and not (tmp_path / "out.recovery").exists()
    assert again.record["recovery"][0]["losses"] == whole.record["recovery"][0]["losses"]


def test_they_are_of_one_seed_and_of_these_rows(tmp_path):
    made(tmp_path)
    for rows, seed in ((ROWS[:5], 0), (ROWS, 1)):
        assert not any(file.is_file() for file in Predictions(rows, seed, tmp_path, ["dense"])._files)


def test_the_dense_model_stays_where_rows_are_read_once_and_both_fit(home, tmp_path, monkeypatch):
    said = {"once": Said(), "twice": Said(), "little memory": Said()}
    recover(home, tmp_path / "once", said["once"], max_steps=None, epochs=1)
    recover(home, tmp_path / "twice", said["twice"], max_steps=None, epochs=2)
    monkeypatch.setattr("llmpruner.recovery.forecast.free_memory", lambda _: 0)
    recover(home, tmp_path / "little", said["little memory"], max_steps=None, epochs=1)
    kept_lines = {name: [line for line in each.lines if "predictions" in line] for name, each in said.items()}
    assert not kept_lines["once"]
    for name in ("twice", "little memory"):
        (line,) = kept_lines[name]
        assert "keeping the dense model's predictions of" in line and line.endswith("MiB")


def test_without_memory_for_the_dense_model_its_layers_are_read_one_by_one(home, tmp_path, monkeypatch):
    expected = recover(home, tmp_path / "resident").record["recovery"][0]
    monkeypatch.setattr("llmpruner.recovery.dense.free_memory", lambda _: 0)
    monkeypatch.setattr("llmpruner.recovery.dense.load_model", lambda *_: pytest.fail("loaded"))
    said = Said()
    found = recover(home, tmp_path / "streamed", said).record["recovery"][0]
    assert any(line.endswith("dense is read layer by layer") for line in said.lines)
    assert found["losses"] == expected["losses"]


def test_too_small_a_disk_is_refused_before(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "TOP", 1 << 50)
    with pytest.raises(OutputError, match="of disk for the dense model's predictions"):
        made(tmp_path)
    assert not bytes_in(tmp_path)
