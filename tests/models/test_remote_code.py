"""Checkpoints with model code of their own: it runs where the user allows it, without a question on the terminal."""

import json
from pathlib import Path

import pytest
from fresh import run_fresh

from llmpruner.testing.models import letters

pytestmark = pytest.mark.slow

COMPOSED = Path(__file__).parents[1] / "discovery" / "composed.py"
WRITE = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
torch.manual_seed(0)
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.1)
model.save_pretrained(sys.argv[1])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of an architecture that only its own files define, with weights and a tokenizer."""
    folder = tmp_path_factory.mktemp("alien") / "model"
    folder.mkdir()
    # Two files, as usual, of which one imports the other.
    configuration, projection, rest = COMPOSED.read_text(encoding="utf-8").partition("class Projection")
    imports = f"{configuration.partition('class ')[0]}from .configuration_own import ComposedConfig\n"
    (folder / "configuration_own.py").write_text(configuration)
    (folder / "modeling_own.py").write_text(imports + projection + rest)
    auto_map = {
        "AutoConfig": "configuration_own.ComposedConfig",
        "AutoModelForCausalLM": "modeling_own.ComposedForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "composed", "auto_map": auto_map}))
    run_python(WRITE, folder)
    letters().save_pretrained(folder)
    return folder


def run_python(code, *arguments, expect=0):
    """A process without standard input, so that a question on the terminal ends it."""
    done = run_fresh(code, *arguments, timeout=250)
    assert done.returncode == expect, done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    return done


def llmpruner(*arguments, expect=0):
    return run_python("from llmpruner.cli import main; main()", *arguments, expect=expect)


def test_without_the_flag_one_line_names_it(folder):
    *_, last = llmpruner("discover", folder, "--family", "auto", expect=2).stderr.splitlines()
    assert last.startswith("error: ") and "--trust-remote-code" in last


def test_with_the_flag_it_is_pruned_and_used(folder, tmp_path):
    trusted = ("--family", "auto", "--trust-remote-code")
    options = ("--ratio", "0.1,0.05", "--set", "prune.layers=0", "--importance", "l1", "--kinds", "mlp")
    pruned = tmp_path / "pruned" / "0.1"
    made = llmpruner("prune", folder, *trusted, *options, "-o", pruned.parent)
    assert "no report was written" not in made.stderr and (pruned.parent / "report.html").is_file()
    assert "--trust-remote-code" in llmpruner("report", pruned, expect=2).stderr
    llmpruner("report", pruned, "--trust-remote-code")
    assert "--trust-remote-code" in llmpruner("generate", pruned, "-p", "a b", expect=2).stderr
    llmpruner("generate", pruned, "--trust-remote-code", "-p", "a b", "--max-new-tokens", "3")
    assert "trust_remote_code=True" in llmpruner("push", pruned, "me/small", "--trust-remote-code").stdout
