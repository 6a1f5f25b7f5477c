"""Bytes on a device: as forecast, few layers of a streamed model, and one line where there are too few."""

import contextlib
import gc
import io
import itertools
from unittest import mock

import pytest
from device_cases import begin, dense, differences, prune, text

from llmpruner import api
from llmpruner.cli import main
from llmpruner.errors import SettingsError
from llmpruner.models.opening import CheckpointWeights
from llmpruner.settings import LoadSettings

SHORT = {"samples": 32, "length": 32}
"""A device without a kernel for attention keeps scores of all pairs of tokens, few of short samples."""
METHODS = ("best", "fast", "llm-pruner")
LARGER = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 8, "num_key_value_heads": 4}
PRUNES = {
    "best": {"method": "best", "kinds": "mlp,attention"},
    "hidden": {"method": "best", "kinds": "hidden", "ratio": 0.1},
    "fast": {"method": "fast"},
    "llm-pruner": {"method": "llm-pruner", "kinds": "mlp,attention"},
    "weights": {"importance": "l2"},
}


@pytest.mark.slow
def test_at_most_a_quarter_above_the_forecast(on_device):
    assert {name: share for name, share in on_device(shares).items() if not 0.5 < share < 1.25} == {}


def shares():
    """Peak bytes on the device, as a share of the forecast."""
    library, model, found = begin(), dense(**LARGER, head_dim=16), {}
    for (name, settings), reads in itertools.product(PRUNES.items(), (False, True)):
        gc.collect()
        before = library.live(0)
        library.reset_peak(0)
        options = {"ratio": 0.2, "calibration": text(), **SHORT, **settings}
        pruned = prune(model, f"{name}-{reads}", "standin", streamed=reads, **options)
        taken = library.peak(0) - before
        found[f"{name}, {'streamed' if reads else 'resident'}"] = taken / pruned.outcome.forecast["device_memory"]
    return found


@pytest.mark.slow
def test_a_streamed_model_holds_at_most_two_layers(on_device):
    """The one that is read, and one more."""
    assert {method: held for method, held in on_device(layers_held).items() if not held < 1.5} == {}


def layers_held():
    """The most that the device holds when weights are read, besides what is outside the layers, in bytes of a layer."""
    library, model = begin(), dense(num_hidden_layers=12, hidden_size=64, intermediate_size=256, head_dim=16)
    layer = 4 * model.graph.decoder_parameters / 12
    outside = 4 * (model.graph.total_parameters - model.graph.decoder_parameters)
    settings = {"kinds": "mlp,attention", "ratio": 0.2, "calibration": text(), "samples": 2, "length": 8}
    read, found = CheckpointWeights.read, {}
    for method in METHODS:
        gc.collect()
        before, held = library.live(0), []

        def watched(weights, part, before=before, held=held):
            held.append((library.live(0) - before - outside) / layer)
            return read(weights, part)

        with mock.patch.object(CheckpointWeights, "read", watched):
            prune(model, method, "standin", streamed=True, method=method, **settings)
        assert len(held) > 3 * 12
        found[method] = max(held)
    return found


def test_too_little_memory(on_device):
    """A model that does not fit is streamed by itself, or refused; where the device is full in spite of the forecast,
    that is said."""
    different, refusal, full = on_device(in_little_memory)
    assert different == ""
    assert "standin:0 has 1.0 MiB of memory" in refusal and "needs at least" in refusal
    assert full.splitlines()[-1].startswith("error: out of memory (standin out of memory: tried to allocate")


def in_little_memory():
    model = dense(**LARGER, num_hidden_layers=6, head_dim=16)
    api.prune(model, output="cpu", ratio=0.2, importance="l2", load=LoadSettings(device="cpu"))
    begin(total=4_000_000)  # a model of 5 MB
    pruned = api.prune(model, output="streamed", ratio=0.2, importance="l2")
    assert pruned.streamed is not None
    different = differences("streamed", "cpu")
    del pruned
    begin(total=1_000_000)
    with pytest.raises(SettingsError) as refused:
        api.prune(model, output="refused", ratio=0.2, importance="l2")
    command = mock.patch("sys.argv", ["llmpruner", "generate", model.path, "-p", "Why?"])
    with command, contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit):
        main()
    return different, str(refused.value), said.getvalue()
