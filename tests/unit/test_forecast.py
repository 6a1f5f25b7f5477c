"""Memory, disk and time are said before a prune, from shapes; ``--max-memory`` chooses how a model is held."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from benchmarks.shapes import write_random
from llmpruner import api
from llmpruner.engine.calls import call_layer
from llmpruner.engine.position import Position, positions
from llmpruner.engine.signals import Product, Signal
from llmpruner.errors import SettingsError
from llmpruner.plugins.catalog import Catalog
from llmpruner.plugins.manager import plugin_manager
from llmpruner.pruning.compensation.least_squares import NormalEquations, solve_bytes
from llmpruner.pruning.criteria.fisher import Fisher
from llmpruner.recipes import residency
from llmpruner.recipes.calibrating import GRADIENT_TOKENS
from llmpruner.recipes.forecast import LATER, Forecast, Residency, Stage, duration
from llmpruner.recipes.forecasting import forecast
from llmpruner.recipes.jobs import prune_job
from llmpruner.recipes.layer_sample import LayerSample, Line, largest_layer, layer_parameters, sample_layer
from llmpruner.recipes.work import Work, work_of
from llmpruner.settings import LoadSettings, PruneSettings, RunSettings, settings_from

H, MLP, LAYERS, VOCABULARY = 64, 160, 3, 512
MIB = 1 << 20
ATTENTION = 2 * H * H + 2 * H * H // 2
LAYER = ATTENTION + 3 * H * MLP + 2 * H
OUTSIDE = 2 * VOCABULARY * H + H


def config(hidden=H, mlp=MLP, layers=LAYERS, vocabulary=VOCABULARY) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, vocab_size=vocabulary,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, dtype="bfloat16",
    )  # fmt: skip


@pytest.fixture(scope="module")
def catalog():
    return Catalog(plugin_manager())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("forecast") / "model"
    write_random(config(), path)
    return path


@pytest.fixture(scope="module")
def structure(folder):
    return api.discover(folder)


def a_sample(rate: float = 1e9) -> LayerSample:
    """A layer that takes a millisecond for each token and 1,000 bytes."""
    time, size = Line(0.0, 1e-3), Line(0.0, 1000.0)
    return LayerSample(LAYER, time, time, time, size, size, size, *[rate] * 6)


def job_of(catalog, **settings):
    return prune_job(settings_from(PruneSettings, {"ratio": 0.2, **settings}), catalog)


def found(structure, work, sample=None, **residency_of) -> Forecast:
    return forecast(structure, work, torch.bfloat16, Residency(**residency_of), sample, base=0)


def test_weights_alone(structure, catalog):
    work = work_of(job_of(catalog, importance="l1"), structure, saves=True)
    resident = found(structure, work, a_sample()).stage("estimation").memory
    assert resident["weights"] == 2 * (LAYERS * LAYER + OUTSIDE)
    # Of one matrix: float32 copy and saliency.
    assert resident["scores of one parameter"] == H * MLP * 8
    streamed = found(structure, work, a_sample(), streamed=True).stage("estimation").memory
    assert streamed["weights outside the layers"] == 2 * OUTSIDE
    assert streamed["weights of two layers"] == 2 * 2 * LAYER


def test_gradients(structure, catalog, monkeypatch):
    work = work_of(job_of(catalog, method="llm-pruner", calibration="self"), structure, saves=True)
    assert (work.tokens, work.scored) == (640, 640)
    memory = found(structure, work, a_sample(), boundary_memory=1 << 30).stage("estimation").memory
    # Before each layer, after the last, and the gradients of one.
    assert memory["hidden states"] == 640 * H * 2 * (LAYERS + 2)
    # Logits in bfloat16; float32, their log-softmax, and two gradients: of all positions, or of some at a time.
    assert memory["logits and their gradients"] == 640 * VOCABULARY * (2 + 12)
    spilled = found(structure, work, a_sample(), boundary_memory=1000)
    assert spilled.stage("estimation").memory["hidden states"] == 1000
    assert spilled.stage("estimation").bytes == sum(memory.values()) - 640 * H * 2 * (LAYERS + 2) + 1000
    monkeypatch.setattr("llmpruner.recipes.forecast_memory.LOGIT_ELEMENTS", 600 * VOCABULARY)
    for whole, tokens in ((False, 600), (True, 640)):
        sample = replace(a_sample(), whole_logits=whole)
        memory = found(structure, work, sample, boundary_memory=1 << 30).stage("estimation").memory
        assert memory["logits and their gradients"] == tokens * VOCABULARY * (2 + 12)


def test_gradients_of_one_layer(structure):
    names = frozenset(n for n in structure.graph.shapes if ".0.mlp." in n or ".1.mlp." in n)
    work = Work(4, 16, signals=frozenset({Signal.GRAD}), names=names, scored=64)
    memory = found(structure, work, a_sample(), boundary_memory=0).stage("estimation").memory
    # Float32 sums, bfloat16 gradients of one micro-batch, and a float32 copy of the largest.
    expected = 3 * H * MLP * (4 + 2) + H * MLP * 4
    assert memory.get("gradients of one layer", expected) == expected


def test_products_of_one_layer(structure, monkeypatch):
    monkeypatch.setattr("llmpruner.recipes.forecast_memory.LOGIT_ELEMENTS", VOCABULARY)
    names = frozenset(n for n in structure.graph.shapes if "down_proj" in n and ".2." not in n)
    work = Work(4, 16, signals=frozenset({Signal.PRODUCT_GRAD}), names=names, scored=64)
    memory = found(structure, work, a_sample(), boundary_memory=0).stage("estimation").memory
    # Inputs and outputs; gradients of outputs and inputs, products and squares; the weight: all in float32.
    expected = 64 * (MLP + H) * 4 + 64 * (H + 3 * MLP) * 4 + H * MLP * 4
    assert memory["products of one layer"] == expected and "gradients of one layer" not in memory


def test_sums_of_products_of_heads(structure, catalog, monkeypatch):
    """Fisher's products of the inputs of an attention output were not counted: float64, one for each pair of inputs."""
    monkeypatch.setattr("llmpruner.recipes.forecast_memory.LOGIT_ELEMENTS", VOCABULARY)
    job = job_of(catalog, importance="fisher", kinds="mlp,attention", samples=4, length=16, calibration="self")
    work = work_of(job, structure, saves=True)
    numbers = {name.split(".")[-2]: count for name, count in work.measured.items()}
    assert numbers == {"down_proj": MLP, "o_proj": H + H * H}
    kept, most = MLP + H + H * H, H + H * H
    memory = found(structure, work, a_sample(), boundary_memory=0).stage("estimation").memory
    rows = work.scored * (MLP + H + H + H) * 4
    # Of one weight: a product in float32, and as it is added in float64; or what the larger one computes.
    largest = max(
        work.scored * (H + 3 * MLP) * 4 + H * MLP * 4 + 12 * MLP, work.scored * 4 * H * 4 + H * H * 4 + 12 * most
    )
    assert memory["products of one layer"] == rows + kept * 8 + largest
    position = positions(structure.graph)["model.layers.0.self_attn.o_proj.weight"]
    product = Product(torch.ones(3, H), torch.ones(3, H), torch.ones(H, H), position, None, 4, torch.ones(3, H))
    assert sum(each.numel() for each in Fisher().measure(product).values()) == Fisher().measured_values(position, H)


def test_memory_of_a_sum_of_products():
    """As `ReduceProducts` adds what `Fisher` computes."""
    width, rows = 512, 4
    total = torch.zeros(width, width, dtype=torch.float64)
    position = Position(0, frozenset({"attention"}))
    product = Product(
        *[torch.ones(rows, width)] * 2, torch.ones(width, width), position, None, 4, torch.ones(rows, width)
    )
    most = peak(lambda: total.add_(Fisher().measure(product)["products"]))
    assert most == pytest.approx((4 + 8) * width**2, rel=0.05)


def test_fits(structure, catalog):
    def best(**settings) -> Work:
        return work_of(job_of(catalog, method="best", length=64, calibration="self", **settings), structure, saves=True)

    assert best(samples=8).scored == 512 and best(samples=1024).scored == GRADIENT_TOKENS
    work = best(samples=8, importance="energy", layers="all")
    assert work.fits and work.chooses and work.tokens == 512 and not work.scored
    kept = len(next(iter(work.kept.values())))
    share = 0.2 * LAYERS * LAYER / (LAYERS * 3 * H * MLP)
    assert kept == pytest.approx(MLP * (1 - share), abs=1)
    result = found(structure, work, a_sample(), boundary_memory=1 << 30)
    memory = result.stage("compensation").memory
    # Two streams in float32, and the inputs of the down projection in bfloat16.
    assert memory["hidden states"] == 2 * 512 * H * 4 + 512 * MLP * 2
    everything = found(structure, work, a_sample(), boundary_memory=0)
    assert everything.disk - result.disk == memory["hidden states"]


def test_what_is_fitted_beside_what_is_cut(structure, catalog):
    def work(**settings) -> Work:
        return work_of(job_of(catalog, method="best", samples=8, length=64, **settings), structure, saves=True)

    base = {"calibration": "self", "layers": "0,1", "shape": "free"}
    plain = work(**base)
    also = work(**base, settings={"refit": {"also": "attention"}})
    weighted = work(**base, settings={"refit": {"token_weights": "divergence"}})
    assert not (plain.weighted or plain.holds_out_sources) and weighted.weighted
    assert set(also.changed) == {*plain.changed, *(f"layers.{n}.attention" for n in range(LAYERS))}
    seconds = [found(structure, one, a_sample()).stage("compensation").seconds for one in (plain, also, weighted)]
    assert seconds[1] > 1.2 * seconds[0] and seconds[2] > 1.2 * seconds[0]
    memory = found(structure, weighted, a_sample()).stage("compensation").memory
    assert memory.get("Gram matrices", MLP**2 * 4) == MLP**2 * 4


@pytest.mark.parametrize(("width", "out"), [(400, 100), (400, 400), (400, 1600), (1400, 700)])
def test_memory_of_a_fit(width, out):
    """The formula gives what torch allocates."""
    equations = NormalEquations(width, out, torch.device("cpu"))
    equations.add(torch.randn(width, width), torch.randn(width, out))
    old = torch.randn(out, width)
    most = peak(lambda: equations.solve(old))
    assert solve_bytes(width, out) == pytest.approx(most + old.nbytes, rel=0.05)


def peak(run) -> int:
    """The most bytes of tensors that ``run`` has in memory beyond those of before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_time_grows_with_tokens(structure, catalog):
    seconds = []
    for samples in (4, 8):
        job = job_of(catalog, importance="energy", samples=samples, length=64, calibration="self")
        seconds.append(
            found(structure, work_of(job, structure, saves=True), a_sample(1e12)).stage("estimation").seconds
        )
    # 256 tokens more through three layers of a millisecond; the check, of one sample, is the same.
    assert seconds[1] - seconds[0] == pytest.approx(256 * 3 * 1e-3, rel=0.01)


def test_cuts_are_measured_in_every_step_that_divides_the_amount(structure, catalog):
    def trials(allocation, steps):
        job = job_of(catalog, **BEST, allocation=allocation, shape="free", steps=steps)
        return work_of(job, structure, saves=False).trials

    once = 3 * LAYERS
    assert [trials("sensitivity", steps) for steps in (1, 2, 5)] == [once, 2 * once, 5 * once]
    assert [trials("search", steps) for steps in (1, 2, 5)] == [once, 2 * once, 2 * once]
    assert trials("uniform", 5) == 0


def test_writing(structure, catalog):
    job = job_of(catalog, importance="energy", samples=16, length=128, calibration="self")
    work = work_of(job, structure, saves=True)
    (written,) = work.written
    assert (written.passages, written.tokens, written.batch) == (32, 64, 32)
    stage = found(structure, work, a_sample(1e12)).stage("writing")
    assert stage.seconds == pytest.approx(64 * (32 * 3 * 1e-3 + 2e-3), rel=0.02)
    # Keys and values of two heads of 16, bfloat16; a step copies those of one layer.
    assert stage.memory["keys and values"] == 32 * 64 * 2 * 16 * (2 + 2) * (LAYERS + 1)


def test_writing_conversations(structure, catalog):
    job = job_of(
        catalog, importance="energy", samples=16, length=128, calibration="self", settings={"self": {"chats": 0.25}}
    )
    work = work_of(job, structure, saves=True)
    chats, passages = work.written
    # Six conversations of 88 tokens fill four samples.
    assert (chats.passages, chats.tokens, chats.batch) == (6, 176, 6)
    assert (passages.passages, passages.tokens, passages.batch) == (24, 64, 24)
    stage = found(structure, work, a_sample(1e12)).stage("writing")
    assert stage.seconds == pytest.approx(64 * (24 * 3e-3 + 2e-3) + 176 * (6 * 3e-3 + 2e-3), rel=0.02)
    assert stage.memory["keys and values"] == 24 * 64 * 2 * 16 * (2 + 2) * (LAYERS + 1)


def test_the_sampled_layer_has_gradients_where_any_has(structure):
    assert largest_layer(structure.graph, {2, None}) == 2
    assert largest_layer(structure.graph) == 0


def test_a_sample_of_a_real_layer(structure):
    names = [name for name in structure.graph.shapes if "mlp" in name]
    sample = sample_layer(structure.config, structure.graph, torch.float32, torch.device("cpu"), 64, names)
    assert sample.parameters == LAYER == layer_parameters(structure.graph)[0]
    assert sample.forward.of(1000) > 0 and sample.backward.of(1000) > sample.plain.of(1000)
    # At least the hidden states before and after, and the two branches of the MLP, for every token.
    assert sample.plain_bytes.token >= 4 * (2 * H + 2 * MLP)
    assert sample.backward_bytes.of(1000) > sample.plain_bytes.of(1000)


def test_gradients_of_products_are_forecast_in_the_dtype_that_they_are_computed_in(structure, monkeypatch):
    monkeypatch.setattr("llmpruner.recipes.layer_sample.computes_bfloat16_fast", lambda model: True)
    names = [name for name in structure.graph.shapes if "mlp" in name]
    ran: list[bool] = []
    monkeypatch.setattr(
        "llmpruner.recipes.layer_sample.call_layer",
        lambda layer, hidden, call: ran.append(torch.is_autocast_enabled("cpu")) or call_layer(layer, hidden, call),
    )
    for exact in (True, False):
        ran.clear()
        sample_layer(structure.config, structure.graph, torch.float32, torch.device("cpu"), 64, names, exact=exact)
        assert all(ran) is not exact


@pytest.fixture
def fake(monkeypatch):
    """No layer is run, and the process takes nothing."""
    monkeypatch.setattr(residency, "_sample", lambda *_: a_sample())
    monkeypatch.setattr(residency, "memory_before", lambda *_: 0)


def test_only_gradients_of_parameters_are_exact(structure, catalog):
    jobs = {name: job_of(catalog, **BEST, importance=name) for name in ("fisher", "taylor")}
    exact = {name: work_of(job, structure, saves=True).exact for name, job in jobs.items()}
    assert exact == {"fisher": False, "taylor": True}


def arranged(structure, catalog, settings, **run):
    job = job_of(catalog, **settings)
    work = work_of(job, structure, saves=True)
    return residency.arranged(structure, job, work, LoadSettings(), RunSettings(**run), catalog)


BEST = {"method": "best", "samples": 64, "length": 256, "calibration": "self"}


def test_max_memory_chooses(structure, catalog, fake):
    """From the largest limit to the smallest: in memory, fewer hidden states, layer by layer, micro-batches."""
    ways, limit = [], 1 << 40
    while True:
        try:
            one = arranged(structure, catalog, BEST, max_memory=limit)
        except SettingsError as error:
            refused = str(error)
            break
        assert one.memory <= limit
        ways.append(one.residency)
        limit = one.memory - 1
    assert ways[0] == Residency()
    assert [way.streamed for way in ways] == sorted(way.streamed for way in ways)
    assert [way.divided for way in ways] == sorted(way.divided for way in ways)
    assert ways[-1].streamed and ways[-1].divided > 1 and ways[-1].boundary_memory == 0
    assert "needs at least" in refused and "MiB" in refused


def test_a_limit_of_boundary_memory_stays(structure, catalog, fake):
    chosen = arranged(structure, catalog, BEST, max_memory=1 << 40, boundary_memory=12345)
    assert chosen.residency.boundary_memory == 12345


def test_what_cannot_fit_is_refused_before_weights_are_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("llmpruner.recipes.opening.Opener.weights", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(SettingsError, match=r"--max-memory 20 MiB: .* needs at least [\d.]+ [MG]iB"):
        api.prune(folder, output=tmp_path / "out", run=RunSettings(max_memory=20 * MIB), ratio=0.2)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_run_alone_has_no_time(structure, catalog, monkeypatch):
    def fails(*_):
        raise RuntimeError

    monkeypatch.setattr(residency, "sample_layer", fails)
    one = arranged(structure, catalog, BEST)
    assert one.seconds is None and one.memory > 0
    assert " s (" not in str(one) and "of memory" in str(one)


def test_the_line():
    stages = (Stage("a", {"weights": 100 * MIB}, 60.0), Stage("b", {"weights": 1100 * MIB}, 120.0))
    one = Forecast(Residency(streamed=True), 128 * MIB, stages, 614 * MIB)
    assert str(one) == "needs about 1.2 GiB of memory, 614 MiB of disk and 3 min (the model is read layer by layer)"
    assert [duration(seconds) for seconds in (0.2, 45, 95, 7200)] == ["1 s", "45 s", "2 min", "2.0 h"]
    assert LATER > 0


MEASURE = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["best", "llm-pruner"])
def test_the_promise_holds(method, tmp_path):
    write_random(config(hidden=512, mlp=1408, layers=8, vocabulary=8000), tmp_path / "model")
    tokens = ("--samples", "12", "--length", "128")
    # What a process has imported differs by hundreds of MiB between builds of torch.
    imported = "import llmpruner.api, psutil, transformers.modeling_utils; print(psutil.Process().memory_info().rss)"
    base = subprocess.run([sys.executable, "-c", imported], capture_output=True, text=True, check=True).stdout
    limit = int(base) + 500 * MIB
    command = ("prune", tmp_path / "model", "--ratio", 0.2, "--no-tokenizer", "-o", tmp_path / "out", "--json")
    options = ("--method", method, *tokens, "--max-memory", f"{limit}B")
    # Started by a small process: Linux counts what a parent holds into the peak of its child.
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, sys.executable, "-m", "llmpruner", *map(str, (*command, *options))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text, _, kibibytes = done.stdout.rpartition("peak ")
    promised, peak = json.loads(text)["forecast"], int(kibibytes) * 1024
    assert peak < limit
    assert promised["memory"] == pytest.approx(peak, rel=0.1)
