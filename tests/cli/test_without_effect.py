"""Options without effect beside the others are refused, and so is what settings and structure show to be impossible: in
one line, before weights are read."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest

from llmpruner.settings import PruneSettings, flag_of

DENSE, OUT = "{models}/dense", ("-o", "{tmp}/out")
L2 = ("plan", DENSE, "--ratio", 0.2, "--importance", "l2")
RECOVER = ("recover", DENSE, "--data", "{models}/data.jsonl", *OUT)
NOTHING_READ = "has no effect with criterion l2 and --compensate none, which read no text"

WITHOUT_EFFECT: dict[str, tuple[tuple[object, ...], str]] = {
    "samples": ((*L2, "--samples", 4), f"--samples {NOTHING_READ}"),
    "length": ((*L2, "--length", 16), f"--length {NOTHING_READ}"),
    "calibration": ((*L2, "--calibration", "{models}/text.txt"), f"--calibration {NOTHING_READ}"),
    "normalize": ((*L2, "--normalize", "mean"), "--normalize has no effect with --allocation uniform"),
    "context of parameters": ((*L2, "--context", 64), "--context has no effect with budget decoder"),
    "context of a number": (
        ("plan", DENSE, "--target-params", "40K", "--context", 64), "--context has no effect with --target-params"
    ),
    "budget of units": (
        ("plan", DENSE, "--unit-ratio", 0.2, "--budget", "bytes"), "--budget has no effect with --unit-ratio"
    ),
    "held-out sources": (
        ("plan", DENSE, "--ratio", 0.2, "--set", "refit.held_out=sources"),
        "held_out = sources has no effect with one source of calibration text; name several, or leave it out",
    ),
    "variant": ((*L2, "--variant", "mix"), "--variant has no effect with criterion l2, which has no setting 'variant'"),
    "rounding of layers": ((*L2, "--kinds", "layer", "--round-to", 8), "--round-to has no effect with --kinds layer"),
    "shape of layers": ((*L2, "--kinds", "layer", "--shape", "free"), "--shape has no effect with --kinds layer"),
    "meeting units": (
        ("plan", DENSE, "--unit-ratio", 0.2, "--meet", "above"), "--meet has no effect with --unit-ratio"
    ),
    "layers of the stream": ((*L2, "--kinds", "hidden", "--layers", "1"), "--layers has no effect with --kinds hidden"),
    "reduction of layers": (
        ("plan", DENSE, "--ratio", 0.3, "--importance", "angular", "--kinds", "layer", "--reduction", "max"),
        "--reduction has no effect with criterion angular",
    ),
    "reduction of one span": (
        ("plan", DENSE, "--ratio", 0.2, "--importance", "energy", "--reduction", "max"),
        "--reduction has no effect: criterion energy scores one span of every group",
    ),
    "a setting twice": (
        ("plan", DENSE, "--ratio", 0.2, "--importance", "taylor", "--variant", "mix", "--set", "taylor.variant=mix"),
        "--variant and --set taylor.variant give the same",
    ),
    "rank": (
        (*RECOVER, "--strategy", "full", "--rank", 4),
        "--rank has no effect with recovery strategy full, which has no setting 'rank'",
    ),
    "no merge": (
        (*RECOVER, "--strategy", "full", "--no-merge"), "--no-merge has no effect with recovery strategy full"
    ),
    "micro batch": (
        (*RECOVER, "--batch-size", 2, "--micro-batch-size", 4),
        "--micro-batch-size has no effect beyond the 2 examples of --batch-size",
    ),
    "a text twice": (
        ("evaluate", DENSE, "--perplexity", "pydoc", "--set", "perplexity.text=pydoc"),
        "--perplexity and --set perplexity.text give the same",
    ),
    "epochs": ((*RECOVER, "--epochs", 1, "--max-steps", 2), "--epochs has no effect with --max-steps"),
    "limit": (("evaluate", DENSE, "--limit", 3), "--limit has no effect without --tasks"),
    "seed of tasks": (("evaluate", DENSE, "--seed", 3), "--seed has no effect without --tasks"),
    "window": (("evaluate", DENSE, "--speed", "--window", 64), "--window has no effect without --perplexity"),
    "kl of one": (("evaluate", DENSE, "--kl"), "--kl compares models with the first one"),
    "size and more": (("evaluate", DENSE, "--speed", "--metrics", "size"), "'size', which is measured already"),
    "seed": (("generate", DENSE, "-p", "x", "--seed", 1), "--seed has no effect at --temperature 0"),
    "dtype of a structure": (("discover", DENSE, "--dtype", "float16"), "--dtype has no effect on discover"),
    "seed of a structure": (("discover", DENSE, "--seed", 1), "--seed has no effect without --verify"),
    "settings of no page": (("discover", DENSE, "--set", "block.layer=1"), "--set has no effect without --html"),
    "model of a criterion": (
        ("new-plugin", "giraffe", "--kind", "criterion", "--from", "llama", *OUT),
        "--from has no effect with --kind criterion",
    ),
    "package of a strategy": (
        ("new-plugin", "giraffe", "--kind", "strategy", "--import", "json", *OUT),
        "--import has no effect with --kind strategy",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WITHOUT_EFFECT)
def test_an_option_without_effect_is_named(refused, what):
    arguments, message = WITHOUT_EFFECT[what]
    assert message in refused(*arguments)


COMMANDS = {
    "discover": (),
    "plan": L2[2:],
    "prune": (*L2[2:], *OUT),
    "recover": RECOVER[2:],
    "evaluate": (),
    "generate": ("-p", "x"),
    "export": ("--to", "stock", *OUT),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_revision_of_local_files_has_no_effect(refused, command):
    line = refused(command, DENSE, "--revision", "main", *COMMANDS[command])
    assert line.startswith("--revision has no effect: '") and "is local" in line


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "generate"])
def test_settings_of_components_are_checked_in_every_command(refused, command):
    html = ("--html", "{tmp}/page.html") if command == "discover" else ()
    for value, message in (
        ("refit", "--set 'refit': expected NAME.key=value, such as taylor.variant=mix"),
        ("no-such.key=1", "--set no-such.… has no effect: 'no-such' is not chosen here"),
    ):
        assert message in refused(command, DENSE, *COMMANDS[command], *html, "--set", value)


@pytest.mark.parametrize("option", PruneSettings.model_fields)
def test_every_option_of_a_prune_is_refused_beside_a_plan(refused, option):
    flag = flag_of(PruneSettings, option)
    line = refused("prune", DENSE, "--plan", "{tmp}/plan.json", flag, "1", *OUT)
    assert line == f"{flag} has no effect beside --plan, which sets everything; leave it out"


@pytest.mark.parametrize("missing", ["{tmp}/nowhere", "nobody/nothing"])
def test_the_last_of_several_models_is_looked_up_before_the_first_is_loaded(refused, tmp_path, missing):
    for command in (("evaluate", "--speed"), ("generate", "-p", "x")):
        line = refused(command[0], DENSE, DENSE, missing, *command[1:])
        assert f"'{missing.format(tmp=tmp_path)}'" in line


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        (("--speed", *(f"--set=speed.{key}=2" for key in ("prompt_tokens", "new_tokens", "runs"))), {"size", "speed"}),
        (("--metrics", "size"), {"size"}),
    ],
)
def test_what_is_not_asked_for_is_not_measured(run, dense, tmp_path, options, measured):
    assert run("evaluate", dense, *options, "--json", tmp_path / "found.json").code == 0
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert {name for name, value in found.items() if value} - {"name"} == measured


@pytest.fixture
def hollow(shared, tmp_path):
    """The model ``dense`` without its weights: a refusal here is one before weights are read."""
    shutil.copytree(shared / "dense", tmp_path / "hollow", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "hollow"


IMPOSSIBLE: dict[str, tuple[tuple[object, ...], str]] = {
    "ratio": (("--ratio", 0.9), "cannot remove 27,878 parameters: the selected kinds and layers can give at most"),
    "ratio, by measurement": (
        ("--ratio", 0.9, "--allocation", "search", "--shape", "free"), "cannot remove 27,878 parameters"
    ),
    "ratio of operations": (("--ratio", 0.9, "--budget", "macs"), "MACs per token: the selected kinds and layers"),
    "number": (("--target-params", "1K"), "the selected kinds and layers can give at most"),
    "rounding": (
        ("--ratio", 0.01, "--round-to", 32, "--shape", "free"),
        "less than one unit of the selected groups under --round-to 32",
    ),
    "rounding beyond the width": (("--ratio", 0.2, "--round-to", 64), "can give at most 0"),
    "less than uniform widths can give": (
        ("--ratio", 0.001), "less than one unit of the selected groups in all layers at once"
    ),
    "less than a unit": (
        ("--ratio", 0.0001, "--shape", "free"), "less than one unit of the selected groups; ask for more"
    ),
    "shares that uniform widths do not have": (
        ("--ratio", 0.2, "--allocation", "global"), "--allocation global has no effect: with --shape uniform"
    ),
    "units in steps": (("--unit-ratio", 0.2, "--steps", 2), "--unit-ratio goes in one step"),
    "kinds that the model lacks": (("--ratio", 0.2, "--kinds", "expert"), "'expert'"),
    "layers that the model lacks": (("--ratio", 0.2, "--layers", "9"), "the model has the layers 0-3"),
}  # fmt: skip


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_the_impossible_is_refused_before_weights_are_read(refused, hollow, what):
    options, message = IMPOSSIBLE[what]
    criterion = () if "--allocation" in options else ("--importance", "l1")
    for command in (("plan",), ("prune", *OUT)):
        assert message in refused(command[0], hollow, *options, *criterion, *command[1:])


def test_the_folder_without_weights_is_found_out_later(refused, hollow):
    assert "model.safetensors" in refused("plan", hollow, *L2[2:], read=True)


def test_the_impossible_is_refused_for_a_model_that_was_pruned(refused, pruned):
    for budget in ("decoder", "macs"):
        line = refused("plan", pruned, "--ratio", 0.9, "--importance", "l1", "--budget", budget)
        assert "can give at most" in line


UNWRITABLE = {
    "a name of 300 characters": ("{tmp}/" + "x" * 300, "cannot be written: File name too long"),
    "a folder of the kernel": ("/proc/out", "'/proc/out' cannot be written: "),
    "a file in the way": ("{models}/text.txt/out", "that should hold 'out' does not exist"),
}


@pytest.mark.parametrize("what", UNWRITABLE)
@pytest.mark.parametrize(
    "command", ["plan", "prune", "recover", "evaluate", "discover", "export", "new-plugin", "demo"]
)
def test_an_output_that_cannot_be_written_is_refused_first(refused, what, command):
    if what == "a folder of the kernel" and sys.platform != "linux":
        pytest.skip("Linux alone has /proc")
    path, message = UNWRITABLE[what]
    arguments = {
        "plan": (*L2, "-o", path),
        "prune": ("prune", *L2[1:], "-o", path),
        "recover": (*RECOVER[:-2], "-o", path),
        "evaluate": ("evaluate", DENSE, "--json", path),
        "discover": ("discover", DENSE, "--html", path),
        "export": ("export", DENSE, "--to", "stock", "-o", path),
        "new-plugin": ("new-plugin", "giraffe", "-o", path),
        "demo": ("demo", "-o", path),
    }
    assert message in refused(*arguments[command])


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_may_not_be_written_is_refused_first(refused, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    assert "/locked/out' cannot be written: Permission denied" in refused("prune", *L2[1:], "-o", "{tmp}/locked/out")


def test_a_directory_of_a_recovery_that_is_in_use_is_refused_first(refused, tmp_path):
    (tmp_path / "out.recovery").mkdir()
    (tmp_path / "out.recovery" / "mine").write_text("x")
    assert "out.recovery is not empty and holds no recovery job" in refused(*RECOVER)


def test_a_model_whose_name_is_too_long_does_not_exist(refused):
    assert "does not exist" in refused("discover", "x" * 300)
    assert "does not exist" in refused("discover", "x" * 300 + ".gguf")


def test_a_replay_looks_for_its_text_before_weights_are_read(refused, run, dense, shared, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text((shared / "text.txt").read_text())
    options = ("--ratio", 0.2, "--calibration", text, "--samples", 2, "--length", 16)
    assert run("plan", dense, *options, "-o", tmp_path / "plan.json").code == 0
    text.unlink()
    assert "text.txt: no such file" in refused("prune", dense, "--plan", tmp_path / "plan.json", *OUT)
