"""``run``: the steps of a recipe, skipped when they are done, continued when they were interrupted, done again when
what they depend on has changed."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from llmpruner import LoadSettings, OutputError, Progress, RunSettings, SettingsError, api
from llmpruner.engine import journal
from llmpruner.pruning.methods.presets import Fast
from llmpruner.recipes import state as state_module
from llmpruner.recipes.state import LOCK, State
from llmpruner.structure.outcome import Outcome
from llmpruner.structure.plan import PruningPlan

NAMES = ["1-prune", "2-recover", "table", "4-export"]


def recipe_of(shared: Path, model: Path | None = None, **more: object) -> dict:
    """Prune, recover, evaluate, export, on a tiny model."""
    return {
        "model": str(model or shared / "dense"),
        "steps": [
            {"prune": {"ratio": 0.2, "samples": 4, "length": 16}},
            {
                "recover": {
                    "data": str(shared / "data.jsonl"),
                    "max_steps": 3,
                    "batch_size": 2,
                    "micro_batch_size": 1,
                    "learning_rate": 0.01,
                }
            },
            {"evaluate": {"perplexity": str(shared / "text.txt"), "window": 64, "tokens": 256}, "name": "table"},
            {"export": {"to": "stock"}},
        ],
        **more,
    }


@pytest.fixture
def file(shared, tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(shared), sort_keys=False))
    return path


@pytest.fixture(scope="module")
def whole(shared, tmp_path_factory) -> Path:
    """The output of a run that was not interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = []
    found = api.run(recipe_of(shared), output=out, on_step=done.append)
    assert tuple(done) == found.steps and [step.name for step in found.steps] == NAMES
    plan, outcome = found["1-prune"].value
    assert isinstance(plan, PruningPlan) and isinstance(outcome, Outcome)
    assert found["1-prune"].result["decoder_removed"] == pytest.approx(outcome.decoder_removed)
    return out


@pytest.fixture
def out(whole, tmp_path) -> Path:
    """A copy of `whole`, with the same times of change."""
    return shutil.copytree(whole, tmp_path / "out")


def checksums(folder: Path) -> dict[str, str]:
    """Of all weights, and of what was measured."""
    files = [*folder.rglob("*.safetensors"), *folder.rglob("results.json")]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files)}


def times(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for name in NAMES for file in (folder / name).rglob("*")}


def reasons(run, *arguments) -> dict[str, str]:
    """What a dry run says of every step."""
    return {
        s["name"]: s["reason"] or s["status"] for s in run("run", *arguments, "--dry-run", "--json").json()["steps"]
    }


def test_a_recipe_runs_from_end_to_end(run, file, whole, shared, tmp_path):
    shown = run("run", file, "-o", tmp_path / "out", "--set", "prune.samples=4")
    assert shown.code == 0, shown.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*NAMES, "recipe.json", "report.html", LOCK])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<h1>2-recover, pruned from dense</h1>" in page and ">Recovery</h2>" in page and "perplexity" in page
    assert checksums(tmp_path / "out") == checksums(whole), "the same in another process and folder"
    for text in ("32 of 48", "4 examples, 3 steps, loss", "perplexity", "loads it", "4 steps;"):
        assert text in shown.out
    header = next(line for line in shown.out.splitlines() if "2-recover" in line and "dense" in line)
    assert header.index("dense") < header.index("1-prune") < header.index("2-recover")
    for number, name in enumerate(NAMES, start=1):
        assert f"• step {number} of 4, {name}\n" in shown.err
    rows = json.loads((tmp_path / "out" / "table" / "results.json").read_text())
    assert [row["name"] for row in rows] == ["dense", "1-prune", "2-recover"]
    options = ("--ratio", 0.2, "--samples", 4, "--length", 16)
    assert run("prune", shared / "dense", *options, "-o", tmp_path / "by_hand").code == 0
    by_hand, made = (folder / "model.safetensors" for folder in (tmp_path / "by_hand", tmp_path / "out" / "1-prune"))
    assert by_hand.read_bytes() == made.read_bytes(), "as the command of the step"


def test_a_second_run_skips_everything(run, file, out):
    before = times(out)
    shown = run("run", file, "-o", out, "--json")
    found = shown.json()
    assert [step["skipped"] for step in found["steps"]] == [True] * 4
    assert times(out) == before
    assert shown.err.count("done before with the same inputs, skipped") == 4
    kept = json.loads((out / "recipe.json").read_text())["steps"]
    assert found["steps"][0]["result"] == kept["1-prune"]["result"] and found["steps"][0]["seconds"] > 0
    assert found["steps"][1]["result"]["steps"] == 3 and found["steps"][1]["result"]["checkpoint"] == "stock"
    assert [row["name"] for row in found["steps"][2]["result"]] == ["dense", "1-prune", "2-recover"]
    assert "model.safetensors" in found["steps"][3]["result"]["files"]
    assert run("run", file, "-o", out).out.strip().endswith("4 steps, 4 of them done before; 0 s")


def test_what_has_changed_is_done_again_with_all_that_depends_on_it(run, file, out, shared):
    weights = (out / "2-recover" / "model.safetensors").read_bytes()
    changed = run("run", file, "-o", out, "--set", "recover.max_steps=2", "--json")
    assert [step["skipped"] for step in changed.json()["steps"]] == [True, False, False, False]
    assert "• step 2 of 4, 2-recover, again: settings.max_steps was 3, is 2\n" in changed.err
    assert "• step 3 of 4, table, again: models.2-recover has changed\n" in changed.err
    assert (out / "2-recover" / "model.safetensors").read_bytes() != weights


def test_only_what_depends_on_a_change_is_done_again(run, file, out, shared, tmp_path, monkeypatch):
    done = dict.fromkeys(NAMES, "done")
    assert reasons(run, file, "-o", out) == done
    # How a run takes place does not count, nor what a measurement is of for what comes after it.
    assert reasons(run, file, "-o", out, "--max-memory", "8GiB") == done
    found = reasons(run, file, "-o", out, "--set", "table.window=32")
    assert found == {**done, "table": "settings.window was 64, is 32"}
    found = reasons(run, file, "-o", out, "--dtype", "bfloat16")
    assert found["1-prune"] == "load.dtype was auto, is bfloat16"
    assert found["4-export"] == "2-recover is to be done again"
    assert reasons(run, file, "-o", out, "--model", shared / "other")["1-prune"] == "models.dense has changed"
    copy = shutil.copytree(shared / "dense", tmp_path / "copy")
    assert reasons(run, file, "-o", out, "--model", copy) == done, "a model is known by its files"
    (copy / "README.md").write_text("a note")
    assert reasons(run, file, "-o", out, "--model", copy) == done
    # Another version of a library, of the package, or of a plugin.
    versions = State(out).steps["2-recover"]["inputs"]["versions"]
    assert {"llmpruner", "torch", "transformers", "peft", "python"} <= versions.keys()
    monkeypatch.setattr("llmpruner.recipes.inputs.__version__", "9")
    assert reasons(run, file, "-o", out)["1-prune"] == "versions.llmpruner was 0.1.0, is 9"


def test_data_is_known_by_its_content(run, out, shared, tmp_path):
    data = tmp_path / "data.jsonl"
    shutil.copyfile(shared / "data.jsonl", data)
    recipe = recipe_of(shared)
    recipe["steps"] = recipe["steps"][:2]
    recipe["steps"][1]["recover"].update(data=f"2*{data},1*{data}", max_steps=1)
    first = api.run(recipe, output=out)
    assert [step.skipped for step in first.steps] == [True, False]
    data.touch()
    assert [step.status for step in api.dry_run(recipe, output=out)] == ["done", "done"]
    data.write_text(data.read_text().replace("Paris", "Rome"))
    assert [step.reason for step in api.dry_run(recipe, output=out)] == ["", f"data.{data} has changed"]


def test_the_text_that_a_method_names_is_known_by_its_content(shared, tmp_path, text_of_method):
    """No setting of the step names it."""
    text, out = text_of_method(Fast), tmp_path / "out"
    recipe = {**recipe_of(shared), "steps": recipe_of(shared)["steps"][:1]}
    api.run(recipe, output=out)
    text.touch()
    assert [step.status for step in api.dry_run(recipe, output=out)] == ["done"]
    text.write_text("The brown quick fox jumps. " * 40)
    assert [step.reason for step in api.dry_run(recipe, output=out)] == [f"data.{text} has changed"]


def test_what_the_user_has_changed_is_not_lost(run, file, out):
    config = out / "2-recover" / "config.json"
    text = config.read_text()
    config.write_text(text + " ")
    for more in ((), ("--set", "recover.max_steps=2"), ("--dry-run",)):
        refused = run("run", file, "-o", out, *more)
        assert refused.code == 2
        assert "2-recover' is not as the step left it (config.json); move it away to keep it" in refused.err
    config.write_text(text)
    (out / "2-recover" / "README.md").write_text("a model card is no change")
    assert set(reasons(run, file, "-o", out).values()) == {"done"}
    shutil.rmtree(out / "table")
    assert reasons(run, file, "-o", out) == {**dict.fromkeys(NAMES, "done"), "table": "its folder is gone"}
    assert run("run", file, "-o", out).code == 0 and (out / "table" / "results.json").is_file()


def test_what_the_user_has_added_is_not_lost(run, file, out):
    model, export = out / "1-prune" / "model.gguf", out / "4-export" / "notes.txt"
    model.write_text("what another program made of the model")
    export.write_text("mine")
    (out / "table" / ".DS_Store").write_text("")
    assert set(reasons(run, file, "-o", out).values()) == {"done"}
    for more in ((), ("--dry-run",)):
        refused = run("run", file, "-o", out, "--set", "prune.ratio=0.3", *more)
        assert refused.code == 2 and "1-prune' is to be replaced" in refused.err and "(model.gguf)" in refused.err
    # A step that waits for others is looked at before they are done.
    refused = run("run", file, "-o", out, "--set", "recover.max_steps=1")
    assert refused.code == 2 and "4-export' is to be replaced" in refused.err and "(notes.txt)" in refused.err
    assert export.read_text() == "mine"
    export.unlink()
    # Steps read what a step wrote, not what lies beside it.
    assert run("run", file, "-o", out, "--set", "recover.max_steps=1").code == 0
    assert model.is_file() and not (out / "table" / ".DS_Store").exists()


class Killed(BaseException):
    """Stands for the end of the process: no handler of `Exception` sees it."""


class StopAt(Progress):
    """Ends the run at the item ``number`` of the bar ``label``, at the training step, or at a status line."""

    def __init__(self, label: str, number: int = 0) -> None:
        self.label, self.number = label, number

    def track(self, items, label):
        for number, item in enumerate(items):
            if (label, number) == (self.label, self.number):
                raise Killed
            yield item

    def status(self, label):
        if label.startswith(self.label):
            raise Killed

    @contextmanager
    def bar(self, label):
        def at(share, now):
            if self.label in now:
                raise Killed

        yield at

    @contextmanager
    def counter(self, label):
        def step(number, total, loss):
            if (label, number) == (self.label, self.number):
                raise Killed

        yield step


def test_a_run_that_is_killed_anywhere_ends_with_the_same_bytes(shared, whole, tmp_path, monkeypatch):
    """One run, killed again and again, in every step and between them."""
    monkeypatch.setattr(journal, "INTERVAL", 0.0)
    monkeypatch.setattr(journal, "SHARE", 1e9)
    recipe, out = recipe_of(shared), tmp_path / "out"

    def killed(progress: Progress | None = None) -> list[str]:
        with pytest.raises(Killed):
            api.run(recipe, output=out, progress=progress or Progress())
        return [step.status for step in api.dry_run(recipe, output=out)]

    assert killed(StopAt("Compensating", 2)) == ["interrupted", "to do", "to do", "to do"]
    assert (out / "1-prune.pruning" / "state.json").is_file() and not (out / "1-prune").exists()
    with monkeypatch.context() as patch:
        patch.setattr(State, "finish", lambda *_: (_ for _ in ()).throw(Killed))
        assert killed()[0] == "interrupted"
    made = (out / "1-prune" / "model.safetensors").stat().st_mtime_ns
    assert killed(StopAt("Recovering", 2)) == ["done", "interrupted", "to do", "to do"]
    assert (out / "1-prune" / "model.safetensors").stat().st_mtime_ns == made, "it was whole"
    assert (out / "2-recover.recovery" / "checkpoint-1").is_dir()
    assert killed(StopAt("perplexity")) == ["done", "done", "interrupted", "to do"]
    assert killed(StopAt("Comparing the outputs")) == ["done", "done", "done", "interrupted"]
    (out / f".4-export.{2**22}.partial").mkdir()  # of a process that was killed while it wrote
    api.run(recipe, output=out)
    assert checksums(out) == checksums(whole)
    assert sorted(p.name for p in out.iterdir()) == sorted([*NAMES, "recipe.json", LOCK])


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_stopped_run_says_that_it_goes_on(stop, shared, tmp_path):
    """Ctrl-C, and SIGTERM, which `main` turns into an exit."""
    said = []

    class Stops(Progress):
        def track(self, items, label):
            raise stop

        def status(self, label):
            said.append(label)

    with pytest.raises(stop):
        api.run(recipe_of(shared), output=tmp_path / "out", progress=Stops())
    assert said[-1] == "stopped in 1-prune; the same command goes on there"


def test_an_interrupted_step_with_other_settings_begins_anew(shared, tmp_path, out):
    recipe = recipe_of(shared)
    recipe["steps"] = recipe["steps"][:2]
    more = {"recover.max_steps": 4}
    with pytest.raises(Killed):
        api.run(recipe, output=out, values=more, progress=StopAt("Recovering", 2))
    assert (out / "2-recover.recovery").is_dir() and not (out / "2-recover").exists()
    planned = api.dry_run(recipe, output=out)[1]
    assert (planned.status, planned.reason) == ("to do", "settings.max_steps was 4, is 3")
    api.run(recipe, output=out)
    assert not (out / "2-recover.recovery").exists()


@pytest.mark.parametrize(("more", "steps"), [({}, 250), ({"batch_size": 64}, 8)], ids=["chosen", "given"])
def test_a_dry_run_counts_the_steps_of_the_batches_that_a_training_takes(more, steps, shared, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"{n}?", "completion": "Paris."}) for n in range(500)))
    recipe = recipe_of(shared)
    recipe["steps"][1] = {"recover": {"data": str(rows), "epochs": 1, "validation": 0, "micro_batch_size": 1, **more}}
    assert api.dry_run(recipe, output=tmp_path / "out")[1].facts["steps"] == steps


def test_a_kill_while_an_old_result_is_removed(shared, whole, out, monkeypatch):
    def half(folder, *_, **__):
        next(iter(folder.glob("*.json"))).unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(state_module.shutil, "rmtree", half)
        with pytest.raises(Killed):
            api.run(recipe_of(shared), output=out, values={"recover.max_steps": 2})
    found = api.run(recipe_of(shared), output=out)
    assert [step.skipped for step in found.steps] == [True, False, True, True], "the others have the same inputs again"
    assert checksums(out) == checksums(whole)


def test_a_kill_between_a_result_and_its_record(run, file, out, whole):
    state = State(out)
    for name in NAMES:
        inputs = state.steps.pop(name)["inputs"]
        state.running[name] = {"inputs": {**inputs, "run": {"max_memory": None}}, "clearing": False}
    state.save()
    before = times(out)
    shown = run("run", file, "-o", out)
    assert shown.code == 0, shown.err
    assert times(out) == before and "step 1 of 4, 1-prune, continued" in shown.err
    facts = [{name: step["result"] for name, step in State(folder).steps.items()} for folder in (out, whole)]
    assert facts[0] == facts[1]


KILLER = """
import os, signal, sys
from contextlib import contextmanager
from llmpruner import Progress, api
from llmpruner.engine import journal

journal.INTERVAL, journal.SHARE = 0.0, 1e9

class Kill(Progress):
    def __init__(self, bar, at):
        self.at = bar, at

    def reached(self, *at):
        if at == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def track(self, items, label):
        for number, item in enumerate(items):
            self.reached(label, number)
            yield item

    @contextmanager
    def counter(self, label):
        yield lambda number, total, loss: self.reached(label, number)

for bar, at in (("Compensating", 1), ("Recovering", 2), ("nothing", 0)):
    child = os.fork()  # spares the imports
    if child == 0:
        api.run(sys.argv[1], output=sys.argv[2], progress=Kill(bar, at))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.long
def test_kill_minus_nine(file, whole, tmp_path):
    command = [sys.executable, "-c", KILLER, str(file), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.stdout.split() == ["-9", "-9", "0"], done.stderr
    assert checksums(tmp_path / "out") == checksums(whole)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*NAMES, "recipe.json", LOCK])


def test_two_runs_on_one_output(run, file, out):
    def times() -> dict:
        # Some versions of filelock write the lock that they do not get.
        return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != LOCK}

    with FileLock(out / LOCK):
        before = times()
        result = run("run", file, "-o", out)
        assert times() == before
        assert result.code == 2 and f"error: another run works on '{out}'; wait for its end" in result.err
    assert run("run", file, "-o", out).code == 0


def test_an_output_of_something_else(run, refused, file, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert "exists already, and no recipe was run in it" in refused("run", file, "-o", "{tmp}/mine")
    assert "exists already, and no recipe was run in it" in refused("run", file, "-o", "{tmp}/mine", "--restart")
    (tmp_path / "mine" / "thesis.txt").rename(tmp_path / "mine" / "recipe.json")
    assert "recipe.json cannot be read" in refused("run", file, "-o", "{tmp}/mine")
    assert "that should hold 'out' does not exist" in refused("run", file, "-o", "{tmp}/none/out")


def test_a_folder_that_no_step_made_is_not_removed(run, file, out):
    (out / "another").mkdir()
    refused = run("run", file, "-o", out, "--set", "table.window=32", "--dry-run")
    assert refused.code == 0
    text = file.read_text().replace("name: table", "name: another")
    file.write_text(text)
    refused = run("run", file, "-o", out)
    assert refused.code == 2 and "another' exists already, and no step of a recipe made it" in refused.err
    assert (out / "another").is_dir()


def test_restart_removes_what_the_recipe_made(run, file, out, whole):
    (out / "notes.txt").write_text("mine")
    shown = run("run", file, "-o", out, "--restart", "--set", "recover.max_steps=1", "--json")
    assert [step["skipped"] for step in shown.json()["steps"]] == [False] * 4
    assert "again" not in shown.err and (out / "notes.txt").is_file()
    assert checksums(out).keys() == checksums(whole).keys()
    refused = run("run", file, "-o", out, "--restart", "--dry-run")
    assert refused.code == 2 and "--restart has no effect on a dry run" in refused.err


def test_a_dry_run_says_what_it_will_take_and_does_nothing(run, file, tmp_path):
    shown = run("run", file, "-o", tmp_path / "out", "--dry-run")
    assert shown.code == 0 and not (tmp_path / "out").exists()
    assert "needs about" in shown.out and "3 steps over 4 examples, about 957 tokens" in shown.out
    assert "4 of 4 steps to do; nothing was done now" in shown.err
    first, second, *_ = run("run", file, "-o", tmp_path / "out", "--dry-run", "--json").json()["steps"]
    assert first["forecast"]["memory"] > 2**20 and first["reads"] == ["dense"] and first["status"] == "to do"
    assert second["forecast"] == {"examples": 4, "steps": 3, "tokens": 957}
    by_layer = ("--set", "recover.strategy=local", "--set", "recover.max_steps=12")
    shown = run("run", file, "-o", tmp_path / "out", "--dry-run", *by_layer)
    assert "3 steps in each of 4 layers over 4 examples, about 957 tokens" in shown.out


BEFORE = {
    "data": (("--set", "recover.data={tmp}/none.jsonl"), "step 2 (recover): {tmp}/none.jsonl: no such file"),
    "text": (("--set", "table.perplexity={tmp}/none.txt"), "step 3 (evaluate): {tmp}/none.txt: no such file"),
    "calibration": (("--set", "1.calibration={tmp}/none.txt"), "step 1 (prune): {tmp}/none.txt: no such file"),
    "layers": (("--set", "prune.layers=9"), "step 1 (prune): layers 9: the model has the layers 0-3"),
    "a criterion": (("--set", "prune.importance=tailor"), "step 1 (prune): unknown criterion 'tailor'"),
    "an exporter": (("--set", "export.to=ggu"), "step 4 (export): unknown exporter 'ggu'; did you mean gguf?"),
    "a key": (("--set", "prune.ratoi=0.2"), "step 1 (prune): prune has no key 'ratoi'; did you mean ratio"),
    "a model": (("--model", "./none"), "model directory './none' does not exist"),
    "no tokenizer": (("--model", "{models}/bare"), "bare' brings no tokenizer, so a pruned model could read no text"),
    "a device": (("--device", "cud"), "device 'cud' cannot be used"),
    "memory": (("--max-memory", "1MB"), "step 1 (prune): --max-memory 1,000,000 bytes: "),
    "a step": (("--set", "prun.ratio=0.2"), "prun.ratio: unknown step 'prun'; did you mean prune"),
}


@pytest.mark.parametrize("what", BEFORE)
def test_mistakes_of_all_steps_are_found_before_any_work(what, refused, file, tmp_path, shared):
    options, message = BEFORE[what]
    options = [str(option).format(tmp=tmp_path, models=shared) for option in options]
    assert message.format(tmp=tmp_path) in refused("run", file, "-o", "{tmp}/out", *options)


def test_models_by_name_and_texts(shared, whole, out):
    recipe = recipe_of(shared)
    recipe["steps"] = [
        *recipe["steps"][:2],
        {"generate": {"max_new_tokens": 2}, "prompt": "The fox", "models": ["dense", "last"], "name": "texts"},
        {"evaluate": {"metrics": "size"}, "models": ["1-prune"]},
        {"bench": {"batch": 1, "prompt": 8, "new": 2, "rounds": 1}, "name": "speed", "models": "last"},
    ]
    found = api.run(recipe, output=out)
    assert [step.skipped for step in found.steps] == [True, True, False, False, False]
    assert [one["name"] for one in found["texts"].result] == ["dense", "2-recover"]
    assert found["texts"].result[0]["prompt"] == "The fox"
    assert [one.name for one in found["4-evaluate"].value] == ["1-prune"]
    assert found["speed"].value.models == ("2-recover",)
    assert found["speed"].result["cases"][0]["models"][0]["name"] == "2-recover"
    with pytest.raises(KeyError):
        found["none"]
    recipe["steps"][2]["prompt"] = "A cat"
    assert api.dry_run(recipe, output=out)[2].reason == "prompt was The fox, is A cat"


def test_one_load_for_each_model(shared):
    both = [shared / "dense", shared / "other"]
    loads = [LoadSettings(dtype="bfloat16"), LoadSettings()]
    first, second = api.evaluate(both, load=loads, metrics="size")
    assert first.size.weight_bytes * 2 == api.evaluate(both[0], metrics="size")[0].size.weight_bytes
    assert second.size.weight_bytes > first.size.weight_bytes
    with pytest.raises(SettingsError, match="load has 1 settings for 2 models"):
        api.bench(both, load=loads[:1])


def test_the_recipes_that_there_are(run):
    shown = run("recipes").out
    assert all(name in shown for name in ("paper", "quality", "llama-cpp", "experts", "demo"))
    assert {row["name"] for row in run("recipes", "--json").json()["recipes"]} >= {"paper", "demo"}
    text = run("recipes", "paper").out
    assert yaml.safe_load(text)["steps"][0]["prune"]["method"] == "llm-pruner"
    assert run("recipes", "paper", "--json").json()["text"].strip() == text.strip()
    refused = run("recipes", "papr")
    assert refused.code == 2 and "unknown recipe 'papr'; did you mean paper?" in refused.err


def test_a_shipped_recipe_runs_by_its_name(run, shared, tmp_path):
    small = ("recover.max_steps=1", "recover.batch_size=2", "recover.micro_batch_size=1", "recover.cutoff=64")
    sets = [f"recover.data={shared / 'data.jsonl'}", *small, "prune.samples=4", "prune.length=16", "evaluate.window=64"]
    options = [word for value in (*sets, f"evaluate.perplexity={shared / 'text.txt'}") for word in ("--set", value)]
    shown = run("run", "quality", "--model", shared / "dense", "-o", tmp_path / "out", *options)
    assert shown.code == 0, shown.err
    assert "KL to the first" in shown.out


def test_restart_of_python_and_a_damaged_state(shared, out):
    (out / "recipe.json").write_text("{}")
    with pytest.raises(OutputError, match="is damaged, or of another version"):
        api.run(recipe_of(shared), output=out, run=RunSettings(restart=True))


def test_libraries_of_later_steps_are_missed_at_once(refused, file, monkeypatch):
    monkeypatch.setattr("llmpruner.exporters.gguf.runtime.is_installed", lambda: False)
    quantised = ("--set", "export.to=gguf", "--set", "export.quant=q8_0")
    found = refused("run", file, "-o", "{tmp}/out", *quantised)
    assert "step 4 (export): llama-cpp-python is not installed; run: pip install 'llmpruner[llama-cpp]'" in found
    monkeypatch.setattr("llmpruner.recipes.checks.find_spec", lambda name: None)
    adapters = ("--set", "recover.strategy=lora")
    assert "step 2 (recover): peft is not installed" in refused("run", file, "-o", "{tmp}/out", *adapters)


def test_a_step_that_is_done_again_keeps_its_place(run, file, out):
    """The report is about the last checkpoint of the recipe, not about that which was made last."""
    shutil.rmtree(out / "1-prune")
    shown = run("run", file, "-o", out, "--json")
    assert [step["skipped"] for step in shown.json()["steps"]] == [False, True, True, True]
    assert list(json.loads((out / "recipe.json").read_text())["steps"]) == NAMES
    assert "<title>2-recover" in (out / "report.html").read_text(encoding="utf-8")
