"""Losses go to other programs while training, and into a drawing."""

from __future__ import annotations

import sys
import types
import xml.etree.ElementTree as ET
from typing import ClassVar

import pytest
from test_recovery_validation import SETTINGS, run
from transformers.integrations import integration_utils

from llmpruner import Catalog, SettingsError
from llmpruner.plugins.manager import plugin_manager
from llmpruner.recipes import jobs
from llmpruner.recovery.full import FullStrategy
from llmpruner.recovery.losses import first_and_last
from llmpruner.report.base import ReportSubject
from llmpruner.report.history import RecoverySection, loss_curve
from llmpruner.settings import RecoverSettings


class Writer:
    """Stands for TensorBoard's, which is not installed with llmpruner."""

    made: ClassVar[list[Writer]] = []

    def __init__(self, log_dir):
        self.log_dir, self.scalars = log_dir, {}
        Writer.made.append(self)

    def add_text(self, *_):
        pass

    def add_scalar(self, name, value, step):
        self.scalars.setdefault(name, {})[step] = value

    def flush(self):
        pass

    close = flush


def test_tensorboard_gets_every_loss(tmp_path, monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setattr(Writer, "made", [])
    settings = SETTINGS.model_copy(update={"report_to": ("tensorboard",)})
    result = run(tmp_path / "out.recovery", FullStrategy(), settings)
    (writer,) = Writer.made
    assert writer.log_dir == str(tmp_path / "out.tensorboard")
    assert writer.scalars["train/loss"] == dict(enumerate(result.losses, start=1))
    assert writer.scalars["eval/loss"] == {one.step: one.loss for one in result.validation}
    assert "report_to" not in result.record()["settings"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_program_that_is_not_installed_is_named(monkeypatch, name):
    monkeypatch.setattr(jobs, "find_spec", lambda _: None)
    settings = RecoverSettings(data="a.jsonl", report_to=name)
    with pytest.raises(SettingsError, match=f"--report-to {name}: {name} is not installed; run: pip install {name}"):
        jobs.recover_job(settings, Catalog(plugin_manager()))


def points(drawing, number=0):
    lines = [one for one in ET.fromstring(drawing).iter() if one.tag.endswith("polyline")]
    return [tuple(map(float, pair.split(","))) for pair in lines[number].attrib["points"].split()]


def test_the_drawing_has_the_losses():
    training = {
        "losses": [4.0, 3.0, 2.5, 2.0], "best_step": 2,
        "validation": [{"step": 0, "loss": 4.5}, {"step": 2, "loss": 2.0}, {"step": 4, "loss": 3.0}],
    }  # fmt: skip
    drawing = loss_curve(training)
    losses, checked = points(drawing), points(drawing, 1)
    assert len(losses) == 4 and len(checked) == 3
    (x0, y0), (x1, _), _, (x3, y3) = losses
    assert x3 - x1 == pytest.approx(2 * (x1 - x0), abs=0.2), "steps are equally far apart"
    assert y0 < y3, "a lower loss is further down"
    assert checked[1][1] == pytest.approx(y3, abs=0.1), "both curves have one scale"
    assert checked[2][0] == pytest.approx(x3, abs=0.1)


@pytest.mark.parametrize("losses", [[2.0, 2.0], [float(n) for n in range(3000, 0, -1)], [1e-6, 2e-6]])
def test_any_number_of_losses_can_be_drawn(losses):
    drawn = points(loss_curve({"losses": losses}))
    assert 1 <= len(drawn) <= 400 and all(0 <= x <= 640 and 0 <= y <= 300 for x, y in drawn)


def test_the_page_has_a_section_for_trainings(gqa):
    training = {"strategy": "lora", "examples": 7, "data": "a<b>.jsonl", "losses": [2.0, 1.0]}
    section = RecoverySection()
    assert section.render(ReportSubject("title", gqa.graph, {})) is None
    text = section.render(ReportSubject("title", gqa.graph, {"recovery": [training, training]}))
    assert text.startswith("<h2>Recovery</h2>") and text.count("<svg") == 2
    assert "a&lt;b&gt;.jsonl" in text and "Training 2 of 2" in text
    layers = [{"before": 0.4, "after": 0.3}, {"before": 0.2, "after": 0.1}]
    by_layer = {**training, "strategy": "local", "losses": [0.4, 0.3, 0.2, 0.1], "layers": layers}
    text = section.render(ReportSubject("title", gqa.graph, {"recovery": [by_layer]}))
    assert "<svg" not in text and "mean loss of 2 layers 0.3000 → 0.2000" in " ".join(text.split())
    assert first_and_last(by_layer) == ("mean loss of 2 layers", pytest.approx(0.3), pytest.approx(0.2))
    assert first_and_last(training) == ("loss", 2.0, 1.0) and first_and_last({**training, "losses": []}) is None
