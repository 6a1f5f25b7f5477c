"""``llmpruner verify``, and what is checked whenever a checkpoint is loaded: damage is named, with file and tensor."""

import json
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import llmpruner
from llmpruner.models import record as records

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def cut(tmp_path_factory, shared) -> Path:
    folder = tmp_path_factory.mktemp("cut") / "model"
    llmpruner.prune(shared / "dense", unit_ratio=0.25, importance="l1", kinds="mlp,attention", output=folder)
    return folder


@pytest.fixture
def copy(cut, tmp_path) -> Path:
    return Path(shutil.copytree(cut, tmp_path / "copy"))


def states(result) -> dict[str, str]:
    return {check["check"]: check["state"] for check in json.loads(result.out)["checks"]}


def flip(file: Path, tensor: str) -> None:
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    first, last = json.loads(data[8 : 8 + length])[tensor]["data_offsets"]
    data[8 + length + (first + last) // 2] ^= 1
    file.write_bytes(data)


def change(folder: Path, edit) -> None:
    """Change tensors, and state the new hashes, as whoever made a wrong model would."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rehash(folder)


def rehash(folder: Path) -> None:
    record = folder / "llmpruner.json"
    records.write_record(record, json.loads(record.read_text()))


def test_a_whole_checkpoint_passes_everything(run, cut):
    result = run("verify", cut, "--json")
    assert result.code == 0 and "the base with the removed units silenced" in result.out
    assert states(result) == dict.fromkeys(("files", "shapes", "weights", "logits"), "passed")
    # Compared on the CPU, whatever the device.
    done = llmpruner.verify_checkpoint(cut, load=llmpruner.LoadSettings(device="cuda"))
    assert {check.state for check in done.checks} == {"passed"}


def test_a_compensated_one_keeps_all_other_weights(run, shared, tmp_path):
    options = ("--ratio", 0.2, "--method", "best", "--samples", 4, "--set", "prune.length=16")
    assert run("prune", shared / "dense", *options, "-o", tmp_path / "out").code == 0
    result = run("verify", tmp_path / "out", "--json")
    assert states(result)["weights"] == "passed" and states(result)["logits"] == "not checked"
    change(tmp_path / "out", lambda t: t.update({UP: t[UP] * 1.001}))
    result = run("verify", tmp_path / "out")
    assert result.code == 1 and f"tensor '{UP}' is not that of the base" in result.err


DAMAGE = {
    "a flipped bit": (lambda d: flip(d / "model.safetensors", UP), "SHA-256 differs)"),
    "a truncated file": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]),
        "model.safetensors has ",
    ),
    "a file that is gone": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "a tensor that is gone": (lambda d: change(d, lambda t: t.pop(UP)), "lacks tensors; it is incomplete"),
    "an unknown tensor": (
        lambda d: change(d, lambda t: t.update({"model.layers.9.x.weight": torch.zeros(2)})),
        "tensor 'model.layers.9.x.weight' belongs to no module",
    ),
    "a tensor of another shape": (lambda d: change(d, lambda t: t.update({UP: torch.zeros(3, 5)})), UP),
    "a changed weight": (
        lambda d: change(d, lambda t: t.update({UP: t[UP] + 1e-6})), f"tensor '{UP}' is not that of"
    ),
    "a configuration of another model": (
        lambda d: (edit_json(d / "config.json", lambda c: c.update(rms_norm_eps=0.5)), rehash(d)),
        "the logits differ from the base",
    ),
    "a record with values of another type": (
        lambda d: edit_json(d / "llmpruner.json", lambda r: r["base_config"].update(tie_word_embeddings="")),
        "llmpruner.json is damaged",
    ),
    "a record that is no JSON": (lambda d: (d / "llmpruner.json").write_text("{"), "llmpruner.json cannot be read"),
}  # fmt: skip


def edit_json(file: Path, edit) -> None:
    values = json.loads(file.read_text())
    edit(values)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(run, copy, what):
    damage, message = DAMAGE[what]
    damage(copy)
    result = run("verify", copy)
    assert result.code == 1, result.out
    assert message in result.err and "Traceback" not in result.err


CODE = {"model_type": "alien", "auto_map": {"AutoConfig": "code.Config"}}
OF_INSTALLATION = {
    "a plugin": (lambda r: r["plans"][0].update(family="of-a-plugin"), "of-a-plugin"),
    "leave to run code": (lambda r: r["base_config"].update(CODE), "--trust-remote-code"),
}


@pytest.mark.parametrize("what", OF_INSTALLATION)
def test_what_this_installation_lacks_is_no_damage(run, copy, what):
    edit, message = OF_INSTALLATION[what]
    edit_json(copy / "llmpruner.json", edit)
    result = run("verify", copy, "--json")
    assert result.code == 0
    assert states(result) == {"files": "passed", **dict.fromkeys(("shapes", "weights", "logits"), "not checked")}
    assert message in json.loads(result.out)["checks"][1]["detail"]


@pytest.mark.parametrize("what", ["a flipped bit", "a truncated file"])
def test_damage_is_named_when_a_checkpoint_is_loaded(refused, copy, what):
    damage, message = DAMAGE[what]
    damage(copy)
    line = refused("generate", copy, "-p", "x", read=True)
    assert message in line and f"{copy}/model.safetensors" in line


def test_earlier_records_and_missing_bases_are_said(run, copy):
    record = json.loads((copy / "llmpruner.json").read_text())
    del record["files"]
    record["base_path"] = record["plans"][0]["base"]["model"] = str(copy / "gone")
    (copy / "llmpruner.json").write_text(json.dumps(record))
    result = run("verify", copy, "--json")
    assert result.code == 0 and "there is no record with hashes" in result.out
    assert {states(result)[name] for name in ("files", "weights", "logits")} == {"not checked"}


def test_a_base_can_be_named(run, refused, cut, shared):
    assert states(run("verify", cut, "--base", shared / "dense", "--json"))["logits"] == "passed"
    message = refused("verify", cut, "--base", shared / "other", read=True)
    assert f"'{shared / 'other'}' is not the model that '{cut}' was pruned from" in message
    assert "parameters differ" in message
    message = refused("verify", cut, "--base", "./nope", read=True)
    assert "'./nope', cannot be opened: model directory './nope' does not exist" in message


def test_a_base_that_is_read_layer_by_layer(cut, monkeypatch):
    low = psutil.virtual_memory()._replace(available=0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: low)
    found = {check.name: check for check in llmpruner.verify_checkpoint(cut).checks}
    assert found["weights"].state == found["logits"].state == "passed"
    assert "a new cut of the base" in found["logits"].detail
