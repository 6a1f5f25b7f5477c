"""How long a prune is said to take."""

import re
import time

import pytest
import tiny_models
import torch
from said import Said

from llmpruner import api
from llmpruner.discovery.opening import Opener
from llmpruner.plugins.installed import load_catalog
from llmpruner.pruning.minutes import Rates, measured, seconds_of
from llmpruner.settings import LoadSettings

RATES = Rates(layers=1e-3, head=1e-4, step=1e-2, operation=1e-11, solved=1e-10, pass_over=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minutes")
    tiny_models.llama(layers=3).save_pretrained(folder)
    return folder


@pytest.fixture
def seconds(folder):
    catalog = load_catalog()
    structure = Opener(catalog, LoadSettings()).structure(str(folder))

    def of(*, streamed=False, cuts=True, ratios=1, **settings):
        job = api._job("prune", {"ratio": 0.2, "length": 64, **settings}, catalog)
        return seconds_of(job, structure, RATES, streamed=streamed, cuts=cuts, ratios=ratios)

    return of


def test_what_is_computed_is_counted(seconds):
    """Text and fits grow with the samples; gradients are computed on the first of them."""
    half, whole = seconds(samples=128), seconds(samples=256)
    assert 1.5 < whole / half < 2.1
    assert seconds(samples=256, streamed=True) > whole + 30, "each token of a passage takes a pass over the weights"
    assert seconds(samples=256, cuts=False) < 0.7 * whole
    assert seconds(samples=256, method="fast") < 0.6 * whole
    assert seconds(samples=64, importance="l2", compensate="none") == pytest.approx(10 + 2 * RATES.pass_over, rel=0.1)
    one, three = seconds(samples=128), seconds(samples=128, ratios=3)
    assert one < three < 2.3 * one


def test_rates_are_measured_in_two_seconds(folder):
    catalog = load_catalog()
    structure, job = Opener(catalog, LoadSettings()).structure(str(folder)), api._job("prune", {"ratio": 0.2}, catalog)
    began = time.monotonic()
    rates = measured(job, structure, 4, torch.device("cpu"))
    assert time.monotonic() - began < 2
    assert all(0 < rate < 1 for rate in rates)


@pytest.mark.parametrize(("rates", "line"), [
    (RATES, r"of memory and .* of disk \(weights: in memory\), and less than a minute$"),
    (Rates(*(300 * rate for rate in RATES)), r"and about \d+ minutes; faster: --method fast, fewer --samples, "),
])  # fmt: skip
def test_minutes_are_said_with_the_memory(rates, line, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("llmpruner.pruning.workspace.measured", lambda *_: rates)
    said = Said()
    api.prune(str(folder), ratio=0.2, samples=16, length=64, output=tmp_path / "out", progress=said)
    (shown,) = [text for text in said.lines if "of memory and" in text]
    assert re.search(line, shown)
