"""Model cards say what the record says, with metadata that the hub's library reads; nothing is sent unasked."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny_models
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from llmpruner_hub import push
from typer.testing import CliRunner

import llmpruner
from llmpruner import CheckpointError, DataError, ModelError, OutputError, SettingsError
from llmpruner.cli.app import build_app

httpx = importlib.import_module(HTTPError.__module__.partition(".")[0])
"""The library by which this version of huggingface_hub sends."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """``dense``, ``stock`` and ``shim``, the two cut from it."""
    folder = tmp_path_factory.mktemp("push")
    tiny_models.llama().save_pretrained(folder / "dense")
    half = {"unit_ratio": 0.5, "importance": "l1"}
    assert llmpruner.prune(folder / "dense", **half, output=folder / "stock").form == "stock"
    assert llmpruner.prune(folder / "dense", **half, layers=[1], shape="free", output=folder / "shim").form == "shim"
    return folder


@pytest.fixture
def hub(monkeypatch):
    """Stands for `HfApi`."""
    stand_in = Mock()
    stand_in.create_commit.return_value.commit_url = "https://hub/me/small/commit/1"
    monkeypatch.setattr(push, "HfApi", lambda: stand_in)
    return stand_in


# The card


def card(*arguments, **options) -> str:
    return push.prepare(*arguments, **options)["README.md"].decode()


def test_the_card_of_a_stock_checkpoint(folders):
    text = card(folders / "stock", "me/small", base_model="org/dense", license="mit")
    read = ModelCard(text)
    assert read.data.to_dict() == {
        "base_model": "org/dense", "library_name": "transformers", "license": "mit",
        "pipeline_tag": "text-generation", "tags": ["llmpruner", "pruned"],
    }  # fmt: skip
    dense, graph = (llmpruner.discover(folders / name).graph for name in ("dense", "stock"))
    share = f"{100 * (1 - graph.decoder_parameters / dense.decoder_parameters):.1f} %"
    assert f"with {share} of its decoder's parameters removed" in read.text
    assert f"| All parameters | {dense.total_parameters:,} | {graph.total_parameters:,} |" in read.text
    assert "| 0-1 | 24 of 48 |" in read.text and "Criterion: `l1`" in read.text
    assert 'from_pretrained("me/small")' in read.text and "trust_remote_code" not in read.text
    assert "pip install" not in read.text and "licence" not in read.text
    assert "llmpruner evaluate org/dense me/small" in read.text
    assert not re.search(r"\n{4,}|\{\{|None", text)


def test_the_card_of_a_model_that_lost_tokens_alone(tmp_path):
    dense = tiny_models.llama()
    dense.save_pretrained(tmp_path / "dense")
    tiny_models.tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(tiny_models.TEXT)
    llmpruner.prune(
        tmp_path / "dense", kinds=("vocabulary",), settings={"vocabulary": {"tokens": 288}}, samples=1, length=16,
        calibration=str(tmp_path / "text.txt"), output=tmp_path / "out",
    )  # fmt: skip
    text = card(tmp_path / "out", "me/small")
    share = 2 * 12 * 32 / sum(p.numel() for p in dense.parameters())
    assert f"with {100 * share:.1f} % of its parameters removed" in text
    assert "Amount: 288 tokens to remain" in text and "| whole model | 288 of 300 |" in text


def test_the_card_of_a_shim_checkpoint(folders):
    text = card(folders / "shim", "me/odd")
    assert 'from_pretrained("me/odd", trust_remote_code=True)' in text and "`modeling_llmpruner.py`" in text
    assert "| 1 | 24 of 48 |" in text
    assert "base_model" not in text and "which its files do not state" in text
    assert "hf download me/odd --local-dir odd\nllmpruner evaluate dense ./odd " in text


@pytest.mark.parametrize("cached", [False, True])
def test_the_licence_is_that_of_the_dense_model(folders, tmp_path, monkeypatch, cached):
    readme = tmp_path / "README.md"
    readme.write_text("---\nlicense: other\nlicense_name: own\nlicense_link: https://a.b/c\n---\n# Dense\n")
    if cached:
        monkeypatch.setattr(push, "try_to_load_from_cache", lambda repo, name: str(tmp_path / name))
        found = push.licence_of("org/dense", None)
    else:
        found = push.licence_of(None, str(tmp_path))
    assert found == {"license": "other", "license_name": "own", "license_link": "https://a.b/c"}
    readme.write_text("---\nlicense: [\n---\n")
    with pytest.raises(CheckpointError, match=r"the licence cannot be read from .*; use --license"):
        push.licence_of(None, str(tmp_path))


def test_a_card_that_is_there_already_is_sent_as_it_is(folders, tmp_path):
    folder = shutil.copytree(folders / "stock", tmp_path / "own")
    (folder / "README.md").write_text("# Mine\n")
    assert card(folder, "me/own") == "# Mine\n"
    for option in ({"license": "mit"}, {"evaluation": tmp_path / "quality.json"}):
        with pytest.raises(SettingsError, match=r"own' has a README\.md, which --license and --evaluation do not"):
            push.prepare(folder, "me/own", **option)


def test_the_card_has_figures_and_says_which_trainings_were_undone(folders, tmp_path):
    folder = shutil.copytree(folders / "stock", tmp_path / "own")
    losses = {"losses": [4.0, 1.0], "validation": [{"step": 0, "loss": 3.0}, {"step": 2, "loss": 2.5}]}
    trained = {"strategy": "full", "examples": 9, "data": "/x/a.jsonl", "held_out": True, **losses}
    record = json.loads((folder / "llmpruner.json").read_text())
    record["recovery"] = [{**trained, "best_step": 2}, {**trained, "best_step": 0}]
    (folder / "llmpruner.json").write_text(json.dumps(record))
    scores = {"dense": {"acc": 0.75, "acc_stderr": 0.1}, "own": {"acc": 0.5, "acc_stderr": 0.1}}
    results = [{"name": str(tmp_path / name), "tasks": {"piqa": values}} for name, values in scores.items()]
    (tmp_path / "quality.json").write_text(json.dumps(results))
    text = card(folder, "me/own", evaluation=tmp_path / "quality.json")
    assert "- `full` on 9 examples of `a.jsonl`, 2 steps: held-out loss 3.000 → 2.500\n" in text
    assert "- `full` on 9 examples of `a.jsonl`, 2 steps: undone, as no step helped\n" in text
    assert "| | dense | own |\n|---|---|---|\n| piqa acc | 0.7500 ± 0.1000 | 0.5000 ± 0.1000 |\n" in text


# The files


def test_folders_of_this_machine_stay_here(folders):
    files = push.prepare(folders / "stock", "me/small")
    record = json.loads(files["llmpruner.json"])
    assert "base_path" not in record and record["plans"][0]["base"]["model"] == "dense"
    assert str(folders) not in (files["llmpruner.json"] + files["README.md"]).decode()
    named = push.prepare(folders / "stock", "me/small", base_model="org/dense")
    assert json.loads(named["llmpruner.json"])["plans"][0]["base"]["model"] == "org/dense"
    own = json.loads((folders / "stock" / "llmpruner.json").read_text())
    assert own["base_path"] == str(folders / "dense")
    values = {"a": ["/x/y.txt,self", "C:\\data\\z.txt", 3, "a/b", None]}
    assert push.public_record(values, None) == {"a": ["y.txt,self", "z.txt", 3, "a/b", None]}


# Sending


@pytest.mark.parametrize("public", [False, True])
def test_everything_is_sent_at_once(folders, hub, public):
    sent = push.prepare(folders / "stock", "me/small")
    assert push.send("me/small", sent, public=public) == "https://hub/me/small/commit/1"
    hub.create_repo.assert_called_once_with("me/small", private=not public, exist_ok=True)
    repo, operations = hub.create_commit.call_args.args
    files = {each.path_in_repo: each for each in operations}
    assert repo == "me/small"
    own = {file.name for file in (folders / "stock").iterdir()}
    assert "run.json" in own and files.keys() == {"README.md", *own} - {"run.json"}
    assert files["README.md"].path_or_fileobj == sent["README.md"]
    assert files["config.json"].path_or_fileobj == str(folders / "stock" / "config.json")


def refusal(status: int) -> HfHubHTTPError:
    request = httpx.Request("POST", "https://hub")
    return HfHubHTTPError("no\nmore", response=httpx.Response(status, request=request))


@pytest.mark.parametrize(("error", "message"), [
    (LocalTokenNotFoundError("x"), "there is no token on this machine; log in with `hf auth login`, or set"),
    (refusal(401), "the token is not valid, or may not write there; log in"),
    (refusal(500), "'me/small' cannot be written: no$"),
    (httpx.ConnectError("unreachable"), "unreachable"),
])  # fmt: skip
def test_what_the_hub_refuses_is_one_line(folders, hub, error, message):
    hub.whoami.side_effect = error
    with pytest.raises(OutputError, match=message) as caught:
        push.send("me/small", push.prepare(folders / "stock", "me/small"))
    assert "\n" not in str(caught.value) and not hub.create_repo.called and not hub.create_commit.called


@pytest.mark.parametrize(("folder", "repo", "options", "kind", "message"), [
    ("dense", "me/x", {}, ModelError, "is no pruned checkpoint with config.json and llmpruner.json"),
    ("stock", "me/x/y", {}, SettingsError, "'me/x/y' is no name of a repository; expected OWNER/NAME"),
    ("stock", "x", {}, SettingsError, "'x' is no name of a repository; expected OWNER/NAME"),
    ("stock", "me/x", {"license": "MIT License"}, SettingsError, "--license 'MIT License': expected an identifier"),
    ("stock", "me/x", {"evaluation": Path("none.json")}, DataError, "none.json cannot be read"),
])  # fmt: skip
def test_mistakes(folders, folder, repo, options, kind, message):
    with pytest.raises(kind, match=message):
        push.prepare(folders / folder, repo, **options)


def test_a_record_without_a_plan(folders, tmp_path):
    config, record = ((folders / "stock" / name).read_text() for name in ("config.json", "llmpruner.json"))
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "llmpruner.json").write_text(json.dumps({**json.loads(record), "plans": []}))
    with pytest.raises(CheckpointError, match="has no plan"):
        push.prepare(tmp_path, "me/x")


def test_the_command_shows_the_card_and_sends_nothing(folders, hub):
    result = CliRunner().invoke(build_app(), ["push", str(folders / "stock"), "me/small"])
    assert result.exit_code == 0 and "# small" in result.output
    size = (folders / "stock" / "model.safetensors").stat().st_size
    assert f"{size:,} bytes  model.safetensors" in result.output
    assert "nothing was sent; --yes sends these files" in result.output and not hub.mock_calls
    result = CliRunner().invoke(build_app(), ["push", str(folders / "stock"), "me/small", "--yes"])
    assert "https://hub/me/small/commit/1" in result.output and hub.create_commit.call_count == 1
