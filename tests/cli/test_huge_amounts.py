"""Amounts of calibration text that the text does not have, or that the machine cannot hold: refused before weights are
read."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import psutil
import pytest

import llmpruner
from llmpruner.recipes import arrangement

PLAN = ("plan", "{models}/dense", "--ratio", 0.2)


def test_more_samples_than_a_text_has_characters_are_refused(refused, shared):
    size = (shared / "text.txt").stat().st_size
    said = f"has {size:,} bytes, so 100,000 samples of it are not all different; lower --samples"
    assert said in refused(*PLAN, "--calibration", "{models}/text.txt", "--samples", 100_000)
    assert said in refused(*PLAN, "--calibration", "self,{models}/text.txt", "--samples", 200_000)
    said = said.replace("100,000", "150,000")
    assert said in refused(*PLAN, "--calibration", "1*self,3*{models}/text.txt", "--samples", 200_000)


def test_memory_that_the_machine_does_not_have_is_refused_with_a_figure(refused, monkeypatch):
    most = psutil.virtual_memory()._replace(total=1 << 24)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: most)
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=1 << 20))
    for text in ("self", "{models}/text.txt"):
        said = refused(*PLAN, "--calibration", text, "--samples", 200)
        assert "of memory (" in said and "this machine has 17 MiB; take fewer or shorter samples" in said


def test_without_progress_large_models_alone_are_forecast(shared, monkeypatch):
    most = psutil.virtual_memory()._replace(total=1 << 24)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: most)
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=1 << 20))
    assert llmpruner.plan(shared / "dense", ratio=0.2, importance="l1").cuts
    monkeypatch.setattr(arrangement, "_SMALL", 0)
    with pytest.raises(llmpruner.SettingsError, match=r"of memory .* this machine has 17 MiB"):
        llmpruner.plan(shared / "dense", ratio=0.2, importance="l1")


def test_the_tokens_of_the_text_are_part_of_the_memory(refused):
    said = refused(*PLAN, "--samples", 100_000, "--length", 512, "--max-memory", "2GiB")
    assert "calibration tokens 3.1 GiB" in said


def test_a_plan_needs_room_for_hidden_states(refused, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "of disk for hidden states" in refused(*PLAN, "--samples", 300, "--boundary-memory", "1MiB")
