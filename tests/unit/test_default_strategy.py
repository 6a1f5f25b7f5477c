"""The strategy of a recovery for which none was named."""

from __future__ import annotations

import json

import pytest
import tiny_models
from said import Said

import llmpruner
from llmpruner import Catalog, ModelError
from llmpruner.plugins.manager import plugin_manager
from llmpruner.recipes.jobs import recover_job
from llmpruner.settings import RecoverSettings


class SaidOfStrategy(Said):
    @property
    def strategy(self):
        (line,) = [line for line in self.lines if line.startswith("strategy ")]
        return line


@pytest.fixture
def home(tmp_path):
    tiny_models.llama().save_pretrained(tmp_path / "dense")
    tiny_models.tokenizer().save_pretrained(tmp_path / "dense")
    llmpruner.prune(str(tmp_path / "dense"), output=tmp_path / "pruned", ratio=0.2, importance="l1", compensate="none")
    rows = [{"prompt": f"{number}? ", "completion": "Paris."} for number in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def recover(home, **options):
    """The name in the record, and what was said."""
    said, values = SaidOfStrategy(), {"data": str(home / "data.jsonl"), **options}
    made = llmpruner.recover(
        str(home / "pruned"), output=home / "out", max_steps=1, batch_size=4, cutoff=64, progress=said, **values
    )
    (record,) = made.record["recovery"]
    return record["strategy"], said


def test_distillation_where_the_dense_model_is_found(home):
    name, said = recover(home)
    assert name == "distil"
    assert (
        said.strategy.startswith("strategy distil, toward the predictions of ") and "dense (--strategy" in said.strategy
    )


def test_adapters_where_it_is_gone(home):
    (home / "dense").rename(home / "elsewhere")
    name, said = recover(home)
    assert name == "lora"
    assert said.strategy.startswith("strategy lora, as distil needs the dense model: the dense model that ")


def test_adapters_where_both_do_not_fit(home, monkeypatch):
    monkeypatch.setattr("llmpruner.recipes.training_memory.machine_memory", lambda: 1 << 20)
    name, said = recover(home)
    assert name == "lora"
    assert said.strategy.startswith("strategy lora, as distil needs about ") and "there are 1 MiB" in said.strategy


@pytest.mark.parametrize(
    ("given", "wanted", "instead"),
    [
        ({}, "distil", "lora"),
        ({"strategy": "distil"}, "distil", None),
        ({"strategy": "lora"}, "lora", None),
        ({"rank": 4}, "lora", None),
        ({"alpha": 4}, "lora", None),
        ({"dropout": 0.1}, "lora", None),
        ({"merge": False}, "lora", None),
        ({"settings": {"lora": {"dora": True}}}, "lora", None),
        ({"settings": {"distil": {"top": 5}}}, "distil", None),
    ],
    ids=str,
)
def test_what_the_settings_say(given, wanted, instead):
    job = recover_job(RecoverSettings(data="a", **given), Catalog(plugin_manager()))
    assert job.strategy.name == wanted
    assert (job.instead and job.instead.name) == instead


def test_settings_of_distillation_need_the_dense_model(home):
    (home / "dense").rename(home / "elsewhere")
    with pytest.raises(ModelError, match=r"the dense model that .* cannot be opened"):
        recover(home, settings={"distil": {"temperature": 2.0}})
