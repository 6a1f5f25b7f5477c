"""Values that no one gives on purpose, and outputs that take nothing: one line, before long work, nothing lost."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch

import llmpruner
from llmpruner import OutputError
from llmpruner.calibration import windows as windows_module
from llmpruner.calibration.calibration import CalibrationSet
from llmpruner.calibration.windows import windows
from llmpruner.engine.journal import Journal
from llmpruner.errors import first_line
from llmpruner.files import check_space, remove_tree, write_failure
from llmpruner.folders import new_directory
from llmpruner.progress import Progress
from llmpruner.structure.plan import _MOST_UNITS, _unpack

FIFTH, L1, OUT = ("--ratio", 0.2), ("--importance", "l1"), ("-o", "{tmp}/out")
DENSE, DATA = "{models}/dense", ("--data", "{models}/data.jsonl")

VALUES = {
    "a seed beyond 32 bits": (("plan", DENSE, *FIFTH, "--seed", 10**23), "--seed"),
    "a seed that numpy refuses": (("recover", DENSE, *DATA, *OUT, "--seed", 2**40), "--seed '1099511627776'"),
    "a negative seed": (("plan", DENSE, *FIFTH, "--seed", -1), "--seed '-1': expected at least 0"),
    "endless epochs": (("recover", DENSE, *DATA, *OUT, "--epochs", "inf"), "--epochs 'inf': expected a finite number"),
    "epochs beyond counting": (("recover", DENSE, *DATA, *OUT, "--epochs", "1e300"), "--epochs '1e300'"),
    "minutes beyond all time": (("recover", DENSE, *DATA, *OUT, "--minutes", 1e300), "expected at most 1,000,000"),
    "steps beyond counting": (("recover", DENSE, *DATA, *OUT, "--max-steps", 10**30), "--max-steps"),
    "samples beyond memory": (("prune", DENSE, *FIFTH, "--samples", 10**8, *OUT), "--samples '100000000'"),
    "a vast rank": (("recover", DENSE, *DATA, *OUT, "--rank", 10**6), "lora: rank = 1000000 is refused"),
    "bounds in digits": (("plan", DENSE, *FIFTH, "--seed", 2**32), "expected at most 4,294,967,295"),
    "rounds beyond memory": (("bench", DENSE, "--rounds", 10**9), "--rounds '1000000000': expected at most 10,000"),
    "sequences beyond memory": (("bench", DENSE, "--batch", 10**9), "--batch '1000000000'"),
    "samples of a curve": (("sensitivity", DENSE, "--samples", 10**9, "-o", "{tmp}/a.json"), "--samples '1000000000'"),
    "a curve of no share": (
        ("sensitivity", DENSE, "--shares", "", "-o", "{tmp}/a.json"), "--shares '': expected at least one number"
    ),
    "a recipe into a device": (("run", "quality", "--model", DENSE, "-o", "/dev/null"), "'/dev/null' is no folder"),
    "5,000 digits": (("plan", DENSE, *FIFTH, "--samples", "9" * 5000), "(5,000 characters)"),
    "5,000 digits of memory": (("plan", DENSE, *FIFTH, "--max-memory", "9" * 5000), "--max-memory"),
    "layers in a vast number": (("plan", DENSE, *FIFTH, *L1, "--layers", "0-99999999999"), "has the layers 0-3"),
    "bytes that are no UTF-8": (("plan", DENSE, *FIFTH, "--calibration", "\udcff.txt"), "is not UTF-8 text"),
}  # fmt: skip


@pytest.mark.parametrize("what", VALUES)
def test_values(refused, what):
    arguments, message = VALUES[what]
    line = refused(*arguments)
    assert message in line and len(line) < 500


def test_repeated_runs_of_units_do_not_fill_the_memory(run, refused, shared, tmp_path):
    (tmp_path / "p").mkdir()
    file = tmp_path / "p" / "plan.json"
    assert run("plan", shared / "dense", *FIFTH, *L1, "-o", file).code == 0
    plan = json.loads(file.read_text())
    next(iter(plan["cuts"].values()))["kept"] = ",".join(["0-4000000"] * 1000)
    file.write_text(json.dumps(plan))
    assert "more than 4,194,304 units" in refused("prune", DENSE, "--plan", file, *OUT)


def test_the_most_units_of_a_group_are_still_read():
    assert len(_unpack(f"0-{_MOST_UNITS - 1}")) == _MOST_UNITS
    with pytest.raises(ValueError, match="more than 4,194,304 units"):
        _unpack(f"0-{_MOST_UNITS}")


def test_a_tokenizer_of_another_model(refused, shared, tmp_path):
    """Token ids beyond the embeddings are named, wherever text is read."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(shared / "dense")
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "small")
    for file in (shared / "dense").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "small")
    text = ("--calibration", "{models}/text.txt", "--samples", 4, "--length", 32)
    for command in (
        ("plan", "{tmp}/small", *FIFTH, *text),
        ("evaluate", "{tmp}/small", "--perplexity", "{models}/text.txt", "--window", 32),
        ("generate", "{tmp}/small", "-p", "The quick brown fox"),
    ):
        assert "has 100 embeddings" in refused(*command, read=True)


def test_text_without_a_blank_is_read_in_pieces(monkeypatch):
    seen = []

    class Tokenizer:
        def __call__(self, text, **_):
            seen.append(len(text))
            return {"input_ids": [ord(c) for c in text[::4]]}

    monkeypatch.setattr(windows_module, "_CHARACTERS_PER_TOKEN", 12)
    ids = windows(["ab" * 500_000], Tokenizer(), samples=4, length=16, seed=0, source="x")
    assert ids.shape == (4, 16) and max(seen) < 10_000


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.arange(40).view(2, 20), "40 tokens of calibration text are too few"),
        (torch.full((10, 20), 7), "only 1 different"),
        (
            torch.arange(100).repeat(3, 1),
            "about 100 of 300 tokens of calibration text are not repeated",
        ),
    ],
)
def test_calibration_that_is_too_small_is_said(ids, words):
    (line,) = CalibrationSet(ids, "x").doubts()
    assert words in line


def test_the_warning_is_shown(run, shared):
    assert not CalibrationSet(torch.arange(200).view(2, 100), "x").doubts()
    result = run("plan", shared / "dense", *FIFTH, "--importance", "energy", "--samples", 1, "--length", 2)
    assert result.code == 0 and "warning: 2 tokens of calibration text are too few" in result.err


class Watching(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def status(self, label):
        self.lines.append(label)


def test_what_was_computed_stays_when_the_result_cannot_be_written(dense, tmp_path, monkeypatch):
    from transformers import modeling_utils

    settings = {"ratio": 0.2, "method": "best", "samples": 4, "length": 16}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(modeling_utils, "safe_save_file", full)
        with pytest.raises(OutputError, match="no space left on the device"):
            llmpruner.prune(dense, output=tmp_path / "out", **settings)
    assert (tmp_path / "out.pruning" / "layer-3.safetensors").is_file()
    watching = Watching()
    llmpruner.prune(dense, output=tmp_path / "out", progress=watching, **settings)
    assert not any("writes its calibration" in line for line in watching.lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_two_prunes_of_one_output(dense, tmp_path):
    journal = Journal(tmp_path / "out.pruning", {})
    with journal.alone(), pytest.raises(OutputError, match="another run works in"):
        llmpruner.prune(dense, output=tmp_path / "out", ratio=0.2, importance="l1")
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_said_before_work(dense, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("llmpruner.files.shutil.disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="of disk for the result and its way there"):
        llmpruner.prune(dense, output=tmp_path / "out", ratio=0.2, importance="l1", progress=Watching())
    data = str(dense.parent / "data.jsonl")
    with pytest.raises(OutputError, match="of disk for the result and states of the training"):
        llmpruner.recover(dense, data=data, output=tmp_path / "out")
    with pytest.raises(OutputError, match="choose another place"):
        check_space(tmp_path / "x", 2000, "x")
    assert list(tmp_path.iterdir()) == []


def test_full_disks_of_all_libraries_are_known():
    from safetensors import SafetensorError

    assert write_failure(OSError(errno.EROFS, "x")) == "the file system is read-only"
    assert write_failure(SafetensorError("I/O error: No space left on device (os error 28)")) == (
        "no space left on the device"
    )
    assert "no space" in (
        write_failure(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos")) or ""
    )
    assert write_failure(OSError(errno.ENOENT, "x")) is write_failure(RuntimeError("shape")) is None


def test_a_training_on_a_full_disk(dense, tmp_path, monkeypatch):
    from llmpruner.recovery.lora import LoraStrategy

    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(LoraStrategy, "train", full)
    with pytest.raises(OutputError, match="goes on from the last one that was"):
        llmpruner.recover(dense, data=str(dense.parent / "data.jsonl"), output=tmp_path / "out")


def test_a_link_to_a_folder_is_removed_with_it(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    remove_tree(tmp_path / "link")
    remove_tree(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_a_new_directory_may_take_an_empty_one(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"), new_directory(tmp_path / "out"):
        pass
    with new_directory(tmp_path / "out", empty=True) as partial:
        (partial / "file").touch()
    assert (tmp_path / "out" / "file").is_file() and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OutputError, match="exists already"), new_directory(tmp_path / "out", empty=True):
        pass


def test_advice_to_run_what_is_in_a_file_is_not_repeated():
    torchs = RuntimeError("Weights only load failed. … set `weights_only=False`, do it only if you trust the file")
    assert first_line(torchs) == "the file holds more than tensors, and is not read"
    assert first_line(ValueError("a\x00\x1bb" + "c" * 900)) == "a��b" + "c" * 396 + "…"


def test_a_configuration_with_half_of_a_surrogate_pair_is_saved(dense, tmp_path):
    shutil.copytree(dense, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "remark": "\ud800"}))
    llmpruner.prune(tmp_path / "model", output=tmp_path / "out", ratio=0.2, importance="l1")
    assert llmpruner.discover(tmp_path / "out").config.remark == "\ud800"


def test_ctrl_c_ends_in_no_traceback(run, dense, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("llmpruner.recipes.opening.load_structure", stop)
    result = run("plan", dense, *FIFTH)
    assert result.code in (1, 130) and "Traceback" not in result.err


def test_a_replayed_plan_gives_the_same_bytes_with_any_number_of_threads(dense, tmp_path):
    plan = llmpruner.plan(dense, ratio=0.2, importance="l1")
    threads = torch.get_num_threads()
    for number in (1, 3):
        torch.set_num_threads(number)
        try:
            llmpruner.prune(dense, plan=plan, output=tmp_path / str(number))
        finally:
            torch.set_num_threads(threads)
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("1", "3"))
    assert first == second


def test_an_output_without_a_name(refused):
    for place in (".", "/"):
        assert f"'{place}'" in refused("recover", DENSE, *DATA, "-o", place)


def test_many_files_are_one_mixture(refused, tmp_path):
    """Together, their names are longer than a name may be."""
    files = ",".join(f"{tmp_path}/train-{number:05}-of-00020.jsonl" for number in range(20))
    assert "train-00000-of-00020.jsonl: no such file" in refused("recover", DENSE, "--data", files, *OUT)
