"""Exports are whole or not there, load their model only when they need it, and keep every byte of their weights."""

import signal
import sys
from dataclasses import replace

import pytest
import torch
from checkpoint_cases import INPUT_IDS, cut_llama, llama_source
from fresh import run_fresh
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import llmpruner
from llmpruner import Exporter, SettingsError, UnsupportedModelError, load_pruned
from llmpruner.discovery.oracle import logits
from llmpruner.errors import CheckpointError, OutputError
from llmpruner.exporters import StockExporter, export
from llmpruner.models import save
from llmpruner.models.record import damaged_files, read_record, recorded_files


class Names(Exporter):
    name = "names"

    def export(self, task):
        (task.directory / "names.txt").write_text("\n".join(name for name, _ in task.model.named_parameters()))
        return f"a text editor opens {task.loaded.tokenizer}"


def test_the_model_is_loaded_once_and_only_for_who_reads_it(tmp_path):
    calls = []

    def load():
        calls.append(1)
        return llama_source("mlp")

    class Copy(Exporter):
        name = "copy"

        def export(self, task):
            (task.directory / "source").write_text(str(task.source))
            return ""

    export(tmp_path, Copy(), tmp_path / "copy", load)
    assert not calls
    assert export(tmp_path, Names(), tmp_path / "names", load) == "a text editor opens None"
    assert len(calls) == 1
    (file,) = (tmp_path / "names").iterdir()
    assert file.read_text().startswith("model.embed_tokens.weight\n")


def test_nothing_is_left_of_an_export_that_fails(tmp_path):
    class Fails(Names):
        def export(self, task):
            super().export(task)
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        export(tmp_path, Fails(), tmp_path / "out", llama_source("mlp").load)
    assert not list(tmp_path.iterdir())

    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        export(tmp_path, Names(), tmp_path / "out", None)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_uniform_model_becomes_a_checkpoint_of_transformers(dtype, tmp_path):
    """And keeps every byte of its weights when it is loaded and saved."""
    record = {"plans": [], "files": {"model.safetensors": {"bytes": 1, "sha256": ""}}}
    source = replace(llama_source("mlp-uniform", dtype), record=record)
    model, line = source.network, export(tmp_path, StockExporter(), tmp_path / "out", source.load)
    assert "LlamaForCausalLM of transformers" in line
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert type(stock) is LlamaForCausalLM
    if dtype == torch.float32:  # otherwise the rotary buffer of ``model`` is rounded
        assert torch.equal(logits(stock, INPUT_IDS), logits(model, INPUT_IDS))
    stock.save_pretrained(tmp_path / "again")
    written, again = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert written.keys() == again.keys()
    for name, tensor in written.items():
        for same in (again[name], model.state_dict()[name]):
            assert same.dtype == tensor.dtype and torch.equal(same, tensor), name
    record = read_record(tmp_path / "out")
    assert record is not None and record["plans"] == [] and "model.safetensors" in record["files"]
    assert list(damaged_files(tmp_path / "out", recorded_files(record) or {})) == []


def test_a_dense_model_gets_no_record(tmp_path):
    export(tmp_path, StockExporter(), tmp_path / "out", replace(llama_source("nothing"), record=None).load)
    assert read_record(tmp_path / "out") is None and load_pruned(tmp_path / "out")


@pytest.mark.parametrize("to", ["stock", "nemotron-nas"])
def test_float16_stays_float16_on_a_cpu(to, tmp_path):
    cut_llama("nothing", torch.float16).save_pretrained(tmp_path / "half")
    llmpruner.export(tmp_path / "half", output=tmp_path / "out", to=to)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}
    llmpruner.export(tmp_path / "half", output=tmp_path / "wide", to=to, load=llmpruner.LoadSettings(dtype="float32"))
    assert {tensor.dtype for tensor in load_file(tmp_path / "wide" / "model.safetensors").values()} == {torch.float32}


def test_what_reads_files_takes_structures_and_refuses_a_model_in_memory(tmp_path):
    """Structures are what a prune to several sizes returns; a model may differ from the files it was loaded from."""
    cut_llama("nothing").save_pretrained(tmp_path / "dense")
    sizes = tmp_path / "sizes"
    (structure,) = llmpruner.prune_each(tmp_path / "dense", ratios=[0.25], importance="l2", output=sizes)
    model = llmpruner.load(structure)
    llmpruner.export(structure, output=tmp_path / "out", to="stock")
    assert llmpruner.verify_checkpoint(structure).damage == ()
    report = llmpruner.write_report([structure], tmp_path / "page.html")
    assert report.path.exists() and (tmp_path / "out" / "model.safetensors").exists()
    for call in (
        lambda: llmpruner.export(model, output=tmp_path / "not", to="stock"),
        lambda: llmpruner.verify_checkpoint(model),
        lambda: llmpruner.write_report(model, tmp_path / "not"),
    ):
        with pytest.raises(SettingsError, match="expected a path, got Model; name the folder"):
            call()


def test_settings_of_loading_that_are_no_settings_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    load, recipe = {"dtype": "bfloat16"}, {"steps": [{"prune": {"ratio": 0.1}}]}
    with pytest.raises(SettingsError, match="write load=LoadSettings"):
        llmpruner.export(tmp_path, output=tmp_path / "out", to="stock", load=load)
    with pytest.raises(SettingsError, match="write load=LoadSettings"):
        llmpruner.run_recipe(recipe, model=tmp_path, output=tmp_path / "out", load=load)


def test_a_stock_export_is_read_back(tmp_path, monkeypatch):
    write = save.save_checkpoint

    def damaged(model, directory, **options):
        form = write(model, directory, **options)
        model.lm_head.weight.data[5] += 1.0
        return form

    monkeypatch.setattr(save, "save_checkpoint", damaged)
    with pytest.raises(CheckpointError, match="gives other outputs"):
        export(tmp_path, StockExporter(), tmp_path / "out", llama_source("mlp-uniform").load)
    assert not list(tmp_path.iterdir())


def test_layers_of_different_widths_are_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="different widths; prune with --shape uniform"):
        export(tmp_path, StockExporter(), tmp_path / "out", llama_source("mlp").load)
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
from llmpruner import Exporter
from llmpruner.exporters import export

class Half(Exporter):
    name, summary = "half", "is killed after one file"

    def export(self, task):
        (task.directory / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

export(Path(sys.argv[1]), Half(), Path(sys.argv[1]) / "out", None)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path):
    done = run_fresh(KILLED, tmp_path)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".partial")
    export(tmp_path, StockExporter(), tmp_path / "out", llama_source("mlp-uniform").load)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
