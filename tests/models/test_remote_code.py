"""Checkpoints with model code of their own: it runs where the user allows it, without a question on the terminal."""

import json
import shutil
from pathlib import Path

import pytest
from fresh import run_fresh
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

pytestmark = pytest.mark.slow

MADE_UP = Path(__file__).parents[1] / "made_up_package" / "made_up"
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 40, "max_position_embeddings": 64,
}  # fmt: skip
WRITE = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
torch.manual_seed(0)
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
model.save_pretrained(sys.argv[1])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of an architecture that only its own files define, with weights and a tokenizer."""
    folder = tmp_path_factory.mktemp("alien") / "model"
    folder.mkdir()
    for name in ("configuration_made_up.py", "modeling_made_up.py"):
        shutil.copyfile(MADE_UP / name, folder / name)
    auto_map = {
        "AutoConfig": "configuration_made_up.MadeUpConfig",
        "AutoModelForCausalLM": "modeling_made_up.MadeUpForCausalLM",
    }
    values = {"model_type": "made_up", "architectures": ["MadeUpForCausalLM"], "auto_map": auto_map, **SIZES}
    (folder / "config.json").write_text(json.dumps(values))
    run_python(WRITE, folder)
    vocabulary = {"<unk>": 0, **{letter: n + 1 for n, letter in enumerate("abcdefgh")}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
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
    options = ("--ratio", "0.1,0.2", "--set", "prune.layers=0", "--importance", "l1", "--kinds", "mlp")
    pruned = tmp_path / "pruned" / "0.1"
    llmpruner("prune", folder, *trusted, *options, "-o", pruned.parent)
    assert "--trust-remote-code" in llmpruner("generate", pruned, "-p", "a b", expect=2).stderr
    llmpruner("generate", pruned, "--trust-remote-code", "-p", "a b", "--max-new-tokens", "3")
    assert "trust_remote_code=True" in llmpruner("push", pruned, "me/small", "--trust-remote-code").stdout


def test_its_report_is_written_and_written_again(folder, tmp_path):
    trusted, pruned = ("--family", "auto", "--trust-remote-code"), tmp_path / "pruned"
    options = ("--ratio", "0.1", "--set", "prune.layers=0", "--importance", "l1")
    made = llmpruner("prune", folder, *trusted, *options, "-o", pruned)
    assert "no report was written" not in made.stderr and (pruned / "report.html").is_file()
    assert "--trust-remote-code" in llmpruner("report", pruned, expect=2).stderr
    llmpruner("report", pruned, "--trust-remote-code")
