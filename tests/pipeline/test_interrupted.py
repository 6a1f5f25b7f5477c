"""A prune that is killed goes on when the same command runs again, and ends with the same bytes."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
from criteria_cases import make
from fresh import run_fresh
from said import Killed, StopAt

from llmpruner import api
from llmpruner.engine import journal as journal_module
from llmpruner.engine.boundaries import Boundaries
from llmpruner.engine.journal import Journal
from llmpruner.errors import LlmprunerError, ModelError, OutputError
from llmpruner.progress import Progress
from llmpruner.pruning import selection, workspace
from llmpruner.settings import RunSettings

SETTINGS = {"ratio": 0.2, "method": "best", "samples": 6, "length": 16, "kinds": "mlp,attention"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "model"
    make("llama-gqa").network.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def every_layer_is_recorded(monkeypatch):
    monkeypatch.setattr(journal_module, "SHARE", 1e9)


def checksums(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("streamed", [False, True])
def test_it_continues_from_the_last_layer_with_the_same_bytes(streamed, dense, tmp_path, monkeypatch):
    # By the size of the free memory.
    monkeypatch.setattr("llmpruner.pruning.forecast.free_memory", lambda _: 0 if streamed else 1 << 50)
    api.prune(str(dense), output=tmp_path / "whole", **SETTINGS)
    out, state = tmp_path / "out", tmp_path / "out.pruning"
    for number in (1, 2):
        with pytest.raises(Killed):
            api.prune(str(dense), output=out, progress=StopAt("Compensating", number), **SETTINGS)
        assert not out.exists()
        assert (state / "state.json").is_file() and (state / "calibration.json").is_file()
    converted = state / ".converted-1.partial"
    converted.mkdir()  # what a killed process left

    class Counted(Progress):
        texts = continued = 0

        def status(self, label):
            self.texts += "writes its calibration" in label
            self.continued += "out.pruning; done: calibration, plan, 2 layers" in label and not converted.exists()

    counted = Counted()
    # More or less memory is free by then, and the shards of the result depend on it.
    monkeypatch.setattr("llmpruner.pruning.forecast.free_memory", lambda _: 1 << 50 if streamed else 0)
    pruned = api.prune(str(dense), output=out, progress=counted, **SETTINGS)
    assert (pruned.streamed is not None) == streamed
    assert counted.texts == 0 and counted.continued == 1, "the text of the interrupted run is used"
    assert checksums(out) == checksums(tmp_path / "whole")
    assert (out / "llmpruner.json").read_text() == (tmp_path / "whole" / "llmpruner.json").read_text()
    assert not state.exists()


def test_hidden_states_of_all_steps_are_in_the_folder_of_the_run(dense, tmp_path, monkeypatch):
    """Whose disk was checked; the system's folder of temporary files may be memory."""
    folders = []
    monkeypatch.setattr(
        "llmpruner.engine.execution.Boundaries", lambda folder: folders.append(folder) or Boundaries(folder)
    )
    api.prune(str(dense), output=tmp_path / "out", steps=2, **SETTINGS)
    assert len(folders) > 2 and set(folders) == {tmp_path / "out.pruning"}


def test_a_run_that_ended_before_its_first_step_is_in_nobodys_way(dense, tmp_path):
    with pytest.raises(Killed):
        api.prune(str(dense), output=tmp_path / "out", progress=StopAt("Writing calibration text", 0), **SETTINGS)
    assert (tmp_path / "out.pruning" / "run.json").is_file()
    api.prune(str(dense), output=tmp_path / "out", **{**SETTINGS, "importance": "l1", "compensate": "none"})
    assert not (tmp_path / "out.pruning").exists()


def test_a_limit_of_memory_holds_for_the_continued_run_too(dense, tmp_path, monkeypatch):
    """The system may have ended the first one because it took too much."""
    with pytest.raises(Killed):
        api.prune(str(dense), output=tmp_path / "out", progress=StopAt("Compensating", 1), **SETTINGS)
    own = workspace.forecast
    monkeypatch.setattr(workspace, "forecast", lambda *a, **options: replace(own(*a, **options), streamed=True))
    pruned = api.prune(str(dense), output=tmp_path / "out", run=RunSettings(max_memory=1 << 40), **SETTINGS)
    assert pruned.streamed is not None


@pytest.mark.parametrize("anew", [False, True])
def test_a_folder_of_the_user_is_not_touched(anew, tmp_path):
    (tmp_path / "out.pruning").mkdir()
    (tmp_path / "out.pruning" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="move it away"), Journal(tmp_path / "out.pruning", {}).running(anew=anew):
        pass
    assert (tmp_path / "out.pruning" / "thesis.txt").read_text() == "mine"


def test_a_refused_run_leaves_no_folder(dense, tmp_path):
    class Refusing(Progress):
        def track(self, items, label):
            if label == "Compensating":
                raise LlmprunerError("refused")
            return items

    with pytest.raises(LlmprunerError, match="refused"):
        api.prune(str(dense), output=tmp_path / "out", progress=Refusing(), **SETTINGS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kinds", ["mlp", "mlp,attention", "mlp,layer", "mlp,hidden"])
@pytest.mark.parametrize("killed", ["in the walk for all", "in the second ratio"])
def test_several_ratios_are_single_runs_with_one_text_and_one_scoring(killed, kinds, dense, tmp_path, monkeypatch):
    """A folder that was finished stays."""
    ratios, out, scored = [0.2, 0.4], tmp_path / "out", []
    settings = {name: value for name, value in {**SETTINGS, "kinds": kinds}.items() if name != "ratio"}
    for ratio in ratios:
        api.prune(str(dense), output=tmp_path / f"{ratio}", ratio=ratio, **settings)
    estimate = selection.estimate
    monkeypatch.setattr(selection, "estimate", lambda *args, **more: scored.append(1) or estimate(*args, **more))

    class Counted(Progress):
        texts, stops = 0, True

        def track(self, items, label):
            self.texts += label == "Writing calibration text"
            stop = (
                label == "Compensating" and self.stops and (killed == "in the walk for all" or (out / "0.2").exists())
            )
            return StopAt(label, 1).track(items, label) if stop else items

    counted = Counted()
    with pytest.raises(Killed):
        api.prune_each(str(dense), output=out, ratios=ratios, progress=counted, **settings)
    finished = [file.stat().st_mtime_ns for file in out.glob("0.2/model.safetensors")]
    assert bool(finished) == (killed == "in the second ratio")
    with pytest.raises(OutputError, match="interrupted run that differs in sizes; "):
        api.prune_each(str(dense), output=out, ratios=[0.2, 0.3], **settings)
    counted.stops = False
    results = api.prune_each(str(dense), output=out, ratios=ratios, progress=counted, **settings)
    assert [result.plans[-1].target.amount for result in results] == ratios
    assert (counted.texts, len(scored)) == (1, 1), "one text to score, to fit and to compare with"
    assert not finished or [(out / "0.2" / "model.safetensors").stat().st_mtime_ns] == finished
    for ratio in ratios:
        files = [file for file in (tmp_path / f"{ratio}").iterdir() if file.name != "run.json"]
        assert all(file.read_bytes() == (out / f"{ratio}" / file.name).read_bytes() for file in files) and files
    assert sorted(p.name for p in out.iterdir()) == ["0.2", "0.4"] and not (tmp_path / "out.pruning").exists()
    with pytest.raises(OutputError, match="exists already"):
        api.prune_each(str(dense), output=out, ratios=ratios, **settings)


@pytest.mark.parametrize(("options", "message"), [
    ({"ratios": []}, "no ratio is named"),
    ({"ratios": [0.2, 20]}, "--ratio 20: input should be less than 1"),
    ({"target_params": "1M"}, "2 are given"),
    ({"ratios": [0.2, 0.99]}, "can't be|cannot be|at most"),
])  # fmt: skip
def test_several_ratios_that_cannot_be_are_refused_before_anything_is_written(options, message, dense, tmp_path):
    with pytest.raises(LlmprunerError, match=message) as raised:
        api.prune_each(str(dense), **{"ratios": [0.2, 0.3], "output": tmp_path / "out", **options})
    assert "\n" not in str(raised.value) and list(tmp_path.iterdir()) == []


def test_several_ratios_of_a_model_in_memory_are_refused(dense, tmp_path):
    """The second would be of what the first left."""
    with pytest.raises(ModelError, match="pass its folder"):
        api.prune_each(api.load(dense), output=tmp_path / "out", ratios=[0.2, 0.3])
    assert list(tmp_path.iterdir()) == []


def test_several_ratios_that_are_refused_in_the_walk_leave_nothing(dense, tmp_path, monkeypatch):
    def refused(*_):
        raise ModelError("the weights are damaged")

    monkeypatch.setattr("llmpruner.pruning.compensation.repair._DenseRun.run", refused)
    with pytest.raises(ModelError, match="damaged"):
        api.prune_each(str(dense), output=tmp_path / "out", ratios=[0.2, 0.3], samples=4, length=16)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys, time
from pathlib import Path
state, *arguments = sys.argv[1:]
child = os.fork()
if not child:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from llmpruner.cli import main
    sys.argv = ["llmpruner", *arguments]
    main()
while not any(Path(state).glob("layer-*.safetensors")):
    if os.waitpid(child, os.WNOHANG)[0]:
        sys.exit("it ended by itself")
    time.sleep(0.002)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
"""


@pytest.mark.slow
def test_a_killed_command_goes_on_in_its_second_ratio(dense, tmp_path):
    """The command itself, killed when the folder of the second ratio has the first layer."""
    command = ("prune", dense, "-o", tmp_path / "out", "--ratio", "0.2,0.4", "--samples", 64, "--method", "best")
    command = (*command, "--set", "prune.length=64", "--json")
    killed = run_fresh(KILLED, tmp_path / "out" / "0.4.pruning", *command)
    assert killed.returncode == 0, killed.stderr
    again = run_fresh("from llmpruner.cli import main; main()", *command)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout), "nothing else is on standard output"
    options = {"ratios": [0.2, 0.4], "samples": 64, "length": 64, "method": "best"}
    api.prune_each(str(dense), output=tmp_path / "other", **options)
    for ratio in ("0.2", "0.4"):
        assert checksums(tmp_path / "out" / ratio) == checksums(tmp_path / "other" / ratio)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "2 pruned models compared" in page and "0.4" in page.partition("<thead>")[2].partition("</table>")[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out"]


@pytest.mark.parametrize("what", ["the text", "the weights"])
def test_a_change_of_what_it_read_is_another_run(what, tmp_path):
    """Of the same size, as two models of one architecture are."""
    model = tiny_models.llama()
    model.save_pretrained(tmp_path / "model")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    settings = {**SETTINGS, "output": tmp_path / "out"}
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps. " * 40)
    settings["calibration"] = str(text)
    with pytest.raises(Killed):
        api.prune(str(tmp_path / "model"), progress=StopAt("Compensating", 1), **settings)
    if what != "the weights":
        text.write_text("The brown quick fox jumps. " * 40)
    else:
        model.model.layers[0].mlp.down_proj.weight.data.mul_(1.01)
        model.save_pretrained(tmp_path / "model")
    with pytest.raises(OutputError, match=r"results of an interrupted run that differs in .*--restart"):
        api.prune(str(tmp_path / "model"), **settings)
    with pytest.raises(OutputError, match=r"prune\.ratio \(0\.\d+, now 0\.35\)"):
        api.prune(str(tmp_path / "model"), **{**settings, "ratio": 0.35})
    api.prune(str(tmp_path / "model"), run=RunSettings(restart=True), **settings)
    assert not (tmp_path / "out.pruning").exists()
