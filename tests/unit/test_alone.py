"""Two runs never write into one folder: the second is refused, and one whose folder was taken stops."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import tiny_models

from llmpruner import api
from llmpruner.errors import OutputError
from llmpruner.folders import alone_in, check_unused
from llmpruner.progress import Progress
from llmpruner.recipes.saving import save_alone
from llmpruner.settings import RunSettings

AGAIN = RunSettings(restart=True)
TEXT = {"samples": 6, "length": 16}
TRAINING = {
    "max_steps": 6,
    "batch_size": 2,
    "micro_batch_size": 2,
    "validation": 4,
    "eval_steps": 1,
    "strategy": "full",
}


class At(Progress):
    """Calls ``act`` once, when a bar is at its second item or a training at its second step."""

    def __init__(self, act) -> None:
        self.act, self.acted = act, False

    def _second(self, number: int) -> None:
        if number == 1 and not self.acted:
            self.acted = True
            self.act()

    def track(self, items, label):
        for number, item in enumerate(items):
            if label == "Compensating":
                self._second(number)
            yield item

    @contextmanager
    def bar(self, label):
        seen: list[float] = []

        def at(share, text="") -> None:
            seen.append(share)
            if label == "measuring cuts":
                self._second(len(seen) - 1)

        yield at

    @contextmanager
    def counter(self, label):
        yield lambda step, *_: self._second(step)


@pytest.fixture
def model(tmp_path) -> str:
    folder = tmp_path / "model"
    tiny_models.llama().save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path) -> str:
    file = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Question {n}: what is it?\n", "completion": f"It is {n * n} or so."} for n in range(16)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(params=["prune", "recover"])
def command(request, tmp_path, model, data):
    """Runs a command with other settings for other ``variant``; and its output and folder."""
    out = tmp_path / ("out")

    def run(variant: int, **options):
        if request.param == "prune":
            api.prune(model, output=out, ratio=0.2 + 0.1 * variant, method="best", **TEXT, **options)
        else:
            api.recover(model, data=data, output=out, seed=variant, **TRAINING, **options)

    ending = {"prune": ".pruning", "recover": ".recovery"}[request.param]
    return run, out, out.with_name(out.name + ending)


def test_a_run_that_still_works_is_not_replaced(command):
    """Neither by the same command nor by another, with --restart or without; and none calls it interrupted."""
    run, out, folder = command

    def others() -> None:
        before = {file.name: file.stat().st_ino for file in folder.iterdir()}
        for variant in (0, 1):
            for options in ({}, {"run": AGAIN}):
                with pytest.raises(OutputError, match="another run works in"):
                    run(variant, **options)
        assert {file.name: file.stat().st_ino for file in folder.iterdir()} == before

    progress = At(others)
    run(0, progress=progress)
    assert progress.acted and out.exists() and not folder.exists()


@pytest.mark.parametrize("replaced", [False, True], ids=["removed", "replaced"])
def test_a_run_whose_folder_was_taken_stops(replaced, command):
    run, out, folder = command

    def taken() -> None:
        folder.rename(folder.with_name("moved"))
        if replaced:
            folder.mkdir()

    progress = At(taken)
    with pytest.raises(OutputError, match=r"was removed or replaced; the run stops"):
        run(0, progress=progress)
    assert progress.acted and not out.exists()
    assert (list(folder.iterdir()) == []) if replaced else not folder.exists()


def test_restart_goes_through_a_link(tmp_path):
    """A folder on another disk stays where it is."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old").write_text("x")
    (tmp_path / "link").symlink_to("disk")
    with alone_in(tmp_path / "link", anew=True) as held:
        assert list((tmp_path / "disk").iterdir()) == []
        (tmp_path / "link" / "new").write_text("x")
        held.check()
        with pytest.raises(OutputError, match="another run works in"):
            check_unused(tmp_path / "disk")
    assert (tmp_path / "disk" / "new").exists()
    check_unused(tmp_path / "disk")
    check_unused(tmp_path / "nowhere")


def test_a_folder_that_never_stays_is_refused_instead_of_tried_for_ever(tmp_path, monkeypatch):
    numbers = iter(range(10**6))
    monkeypatch.setattr("llmpruner.folders._inode", lambda folder: (0, next(numbers)))
    with pytest.raises(OutputError, match="is removed or replaced as soon as it is created"), alone_in(tmp_path / "a"):
        pass


@pytest.mark.parametrize("taken", [False, True])
def test_a_result_whose_folder_was_taken_while_it_was_written_is_removed(tmp_path, taken):
    """Layers may have been read from the folder of another run."""
    folder, out = tmp_path / "out.pruning", tmp_path / "out"

    def write() -> str:
        out.mkdir()
        (out / "config.json").write_text("{}")
        if taken:
            folder.rename(tmp_path / "moved")
            folder.mkdir()
        return "stock"

    with alone_in(folder) as held:
        if taken:
            with pytest.raises(OutputError, match="was removed or replaced"):
                save_alone(held, out, write)
        else:
            assert save_alone(held, out, write) == "stock"
    assert out.exists() is not taken
