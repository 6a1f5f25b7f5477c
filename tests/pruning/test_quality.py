"""What `prune` says of itself: memory and disk that it takes, and the divergence on text that nothing was fitted to."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from criteria_cases import SMALL
from torch.nn import functional
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

import llmpruner
from llmpruner.calibration.calibration import CalibrationJob, SelfWritten, TextSource, parse_calibration

TEXT = " ".join(f"{n} and {n + 1} make {2 * n + 1}, but {n} times {n} is {n * n}." for n in range(1500))
SAMPLES, LENGTH = 6, 64
SOURCES = {source.name: source for source in (SelfWritten, TextSource)}


def sharpened(model):
    """``model`` with predictions that a cut changes by more than rounding does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    (folder / "text.txt").write_text(TEXT)
    sharpened(tiny_models.llama(layers=3)).save_pretrained(folder / "llama")
    tiny_models.tokenizer().save_pretrained(folder / "llama")
    # Its logits are scaled after the head, which has the weights of the embedding.
    torch.manual_seed(0)
    sharpened(GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=0.5, tie_word_embeddings=True))).save_pretrained(
        folder / "granite"
    )
    return folder


def by_hand(before, after, calibrated, read):
    """Mean KL, agreement and number of the tokens of ``read`` that end no 16 tokens of ``calibrated``."""
    known = {tuple(row[at : at + 16]) for row in calibrated.tolist() for at in range(len(row) - 15)}
    places = [
        (row, at - 1)
        for row, ids in enumerate(read.tolist())
        for at in range(15, len(ids))
        if tuple(ids[at - 15 : at + 1]) not in known
    ]
    with torch.no_grad():
        logits = [model(read).logits.float() for model in (before, after)]
    p, q = (each[tuple(zip(*places, strict=True))].log_softmax(-1) for each in logits)
    kl = functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
    return float(kl), float((p.argmax(-1) == q.argmax(-1)).float().mean()), len(places)


@pytest.mark.parametrize(("name", "streamed", "options", "rounds"), [
    ("llama", False, {"method": "best", "kinds": "mlp"}, False),
    ("llama", True, {"method": "llm-pruner", "kinds": "mlp,attention"}, False),
    ("granite", True, {"method": "best", "kinds": "mlp"}, False),
    ("granite", False, {"importance": "block-influence", "kinds": "layer"}, False),
    ("llama", True, {"importance": "block-influence", "kinds": "layer"}, True),
])  # fmt: skip
def test_it_is_the_divergence_of_the_saved_models(name, streamed, options, rounds, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("llmpruner.pruning.forecast.free_memory", lambda _: 0 if streamed else 1 << 50)
    monkeypatch.setattr("llmpruner.models.numbers.multiplies_bfloat16_fast", lambda device: rounds)
    # Several parts of the positions, and one that is smaller.
    monkeypatch.setattr("llmpruner.pruning.quality.LOGIT_ELEMENTS", 2 * 300 * 100)
    source = str(folder / "text.txt") if name == "llama" else "self"
    chosen = {"calibration": source, "samples": SAMPLES, "length": LENGTH, "ratio": 0.3, "seed": 3}
    found = llmpruner.prune(str(folder / name), output=tmp_path / "out", **chosen, **options)
    assert (found.streamed is not None) == streamed
    dense = llmpruner.load(folder / name)
    job = CalibrationJob(source, parse_calibration(source, SOURCES, {}), SAMPLES, LENGTH)
    if job.writes:  # both at once
        calibrated, read = job.draw(dense, 2 * SAMPLES, 3).split(SAMPLES)
    else:
        calibrated, read = job.draw(dense, SAMPLES, 3), job.draw(dense, SAMPLES, 4)
    kl, agreement, tokens = by_hand(dense.network, llmpruner.load_pruned(tmp_path / "out"), calibrated, read)
    quality = found.outcome.quality
    assert kl > 0.01
    assert quality.tokens == tokens
    assert quality.kl_per_token == pytest.approx(kl, rel=0.05 if rounds else 1e-3)
    assert quality.top1_agreement == pytest.approx(agreement, abs=(10 if rounds else 1.01) / tokens)
    record = json.loads((tmp_path / "out" / "llmpruner.json").read_text())
    assert record["work"][-1]["quality"]["kl_per_token"] == quality.kl_per_token


def test_text_that_was_calibrated_on_does_not_count(folder, tmp_path):
    """A text of fewer tokens than the calibration reads has no other ones."""
    (tmp_path / "short.txt").write_text(TEXT[:150])
    options = {"method": "llm-pruner", "ratio": 0.3, "samples": 40, "length": 32}
    pruned = llmpruner.prune(str(folder / "llama"), calibration=str(tmp_path / "short.txt"), **options)
    assert pruned.outcome.quality is None
    assert "quality" not in pruned.outcome.as_json()
    assert "quality" not in pruned.work[-1]


SHAPE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "vocab_size": 2048}
SETTINGS = {"ratio": 0.2, "importance": "taylor", "samples": 16, "length": 16, "calibration": "self"}
TRIALS = {**SETTINGS, "importance": "l2", "allocation": "sensitivity"}
PROBE = """
import json, re, sys
from pathlib import Path
import psutil
from llmpruner import api
from llmpruner.progress import Progress
from llmpruner.pruning import forecast

forecast.free_memory = lambda _: int(sys.argv[3])
# Linux counts what a parent holds into the peak of its child.
Path("/proc/self/clear_refs").write_text("5")
before = psutil.Process().memory_info().rss
pruned = api.prune(sys.argv[1], output=sys.argv[2], progress=Progress(), **json.loads(sys.argv[4]))
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"before": before, "peak": peak, **pruned.outcome.forecast}))
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """71 M parameters in float32, 285 MB, so that weights are most of what a run adds."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=4))
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("settings", "streamed"),
    [(SETTINGS, True), *(pytest.param(each, False, marks=pytest.mark.long) for each in (SETTINGS, TRIALS))],
)
def test_it_is_not_far_below_or_above_what_a_run_takes(dense, tmp_path, settings, streamed):
    free = 0 if streamed else 1 << 50
    arguments = [dense, tmp_path / "out", free, json.dumps(settings)]
    run = subprocess.run([sys.executable, "-c", PROBE, *map(str, arguments)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["streamed"] == streamed
    expected, taken = found["memory"] - found["before"], found["peak"] - found["before"]
    assert 0.9 * taken <= expected <= 1.6 * taken, found
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert 0.9 * written <= found["disk"] <= 1.6 * written
