"""``run``: the steps of a recipe, skipped when they are done, continued when they were interrupted, done again when
what they depend on has changed."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from said import Killed, StopAt

from llmpruner import LoadSettings, OutputError, RunSettings, api
from llmpruner.discovery.opening import Opener
from llmpruner.engine import journal
from llmpruner.files import alone_in
from llmpruner.progress import Progress
from llmpruner.recipes import run as running
from llmpruner.recipes.recipe import Recipe
from llmpruner.recipes.run import RecipeRun
from llmpruner.structure.outcome import Outcome
from llmpruner.structure.plan import PruningPlan

NAMES = ["1-prune", "2-recover", "table", "4-export"]


def recipe_of(shared: Path) -> dict:
    training = {"max_steps": 3, "batch_size": 2, "micro_batch_size": 1, "learning_rate": 0.001}
    text = {"perplexity": str(shared / "text.txt"), "window": 64, "settings": {"perplexity": {"tokens": 256}}}
    return {
        "model": str(shared / "dense"),
        "steps": [
            {"prune": {"ratio": 0.2, "samples": 4, "length": 16}},
            {"recover": {"data": str(shared / "data.jsonl"), **training}},
            {"evaluate": text, "name": "table"},
            {"export": {"to": "stock"}},
        ],
    }


@pytest.fixture
def file(shared, tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(shared), sort_keys=False))
    return path


@pytest.fixture(scope="module")
def whole(shared, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    done = []
    found = api.run_recipe(recipe_of(shared), output=out, on_step=done.append)
    assert tuple(done) == found.steps and [step.name for step in found.steps] == NAMES
    plan, outcome = found["1-prune"].value
    assert isinstance(plan, PruningPlan) and isinstance(outcome, Outcome)
    assert found["1-prune"].result["decoder_removed"] == outcome.decoder_removed
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


def skipped(recipe, out, **options) -> list[bool]:
    """Whether each step of a further run was done before."""
    return [step.skipped for step in api.run_recipe(recipe, output=out, **options).steps]


def test_a_recipe_runs_from_end_to_end(run, file, whole, shared, tmp_path):
    shown = run("run", file, "-o", tmp_path / "out", "--set", "prune.samples=4")
    assert shown.code == 0, shown.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*NAMES, "report.html"])
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
    options = ("--ratio", 0.2, "--samples", 4, "--set", "prune.length=16")
    assert run("prune", shared / "dense", *options, "-o", tmp_path / "by_hand").code == 0
    by_hand, made = (folder / "model.safetensors" for folder in (tmp_path / "by_hand", tmp_path / "out" / "1-prune"))
    assert by_hand.read_bytes() == made.read_bytes(), "as the command of the step"


def test_a_second_run_skips_everything(run, file, out):
    before = times(out)
    shown = run("run", file, "-o", out, "--json")
    steps = shown.json()["steps"]
    assert [step["skipped"] for step in steps] == [True] * 4 and times(out) == before
    assert shown.err.count("done before with the same inputs, skipped") == 4
    assert steps[0]["result"] == json.loads((out / "1-prune" / "run.json").read_text())["step"]["result"]
    assert steps[1]["result"]["steps"] == 3 and steps[1]["result"]["checkpoint"] == "stock"
    assert [row["name"] for row in steps[2]["result"]] == ["dense", "1-prune", "2-recover"]
    assert "model.safetensors" in steps[3]["result"]["files"]
    assert run("run", file, "-o", out).out.strip().endswith("4 steps, 4 of them done before; 0 s")


def test_what_has_changed_is_done_again_with_all_that_depends_on_it_alone(run, file, out, shared, tmp_path):
    recipe = yaml.safe_load(file.read_text())
    assert skipped(recipe, out, values={"table.window": 32}) == [True, True, False, True]
    copy = shutil.copytree(shared / "dense", tmp_path / "copy")
    (copy / "README.md").write_text("a note")
    assert skipped(recipe, out, model=copy, values={"table.window": 32}) == [True] * 4, "a model is its files"
    shutil.rmtree(out / "table")
    assert skipped(recipe, out) == [True, True, False, True]
    changed = run("run", file, "-o", out, "--set", "recover.max_steps=2", "--json")
    assert [step["skipped"] for step in changed.json()["steps"]] == [True, False, False, False]
    assert "• step 2 of 4, 2-recover, again: settings changed\n" in changed.err
    assert "• step 3 of 4, table, again: models changed\n" in changed.err
    narrow = LoadSettings(dtype="bfloat16")
    assert skipped(recipe, out, load=narrow) == [False] * 4
    stop = StopAt("step 1 of 4, 1-prune, again: models changed")
    with pytest.raises(Killed):
        api.run_recipe(recipe, output=out, model=shared / "other", load=narrow, progress=stop)
    assert skipped(recipe, out, load=narrow) == [True] * 4, "what a run did not replace is still there"


def test_the_report_is_of_the_steps_that_were_run(run, file, out):
    """It was of what a longer recipe had left in the folder, with what that had measured of other weights."""
    recipe = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**recipe, "steps": recipe["steps"][:1]}))
    for options, measured in (((), True), (("--set", "prune.ratio=0.3"), False)):
        assert run("run", file, "-o", out, *options).code == 0
        page = (out / "report.html").read_text(encoding="utf-8")
        assert "<h1>1-prune, pruned from dense</h1>" in page and ("bits per byte" in page) == measured


def no_name(path, target):
    """`Path.rename`, where the process ends before the result of a step gets its name."""
    if path.name.startswith("1-prune."):
        raise Killed
    return path.replace(target)


def no_step(*_, **__):
    """`write_step`, where the process ends before it."""
    raise Killed


def test_a_run_that_is_killed_anywhere_ends_with_the_same_bytes(shared, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "SHARE", 1e9)
    recipe, out = recipe_of(shared), tmp_path / "out"

    def killed(progress: Progress, **options) -> list[str]:
        with pytest.raises(Killed):
            api.run_recipe(recipe, output=out, progress=progress, **options)
        return sorted(re.sub(r"\.[0-9a-f]{8}", ".new", folder.name) for folder in out.iterdir())

    others = {"prune.samples": 5}
    assert killed(StopAt("Compensating", 2), values=others) == ["1-prune.new.pruning"]
    assert killed(StopAt("Compensating", 2)) == ["1-prune.new.pruning"], "not both"
    assert len(list(out.glob("*/state.json"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(running, "write_step", no_step)
        assert killed(Progress()) == ["1-prune.new"], "whole, but not known to be"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", no_name)
        assert killed(Progress()) == ["1-prune.new"], "whole, but without its name"
    made = next(out.glob("1-prune.*/model.safetensors")).stat().st_mtime_ns
    assert killed(StopAt("Recovering, step 2")) == ["1-prune", "2-recover.new.recovery"]
    assert (out / "1-prune" / "model.safetensors").stat().st_mtime_ns == made
    assert next(out.glob("2-recover.*/checkpoint-1")).is_dir()
    assert killed(StopAt("perplexity")) == ["1-prune", "2-recover"]
    assert killed(StopAt("Comparing the outputs")) == ["1-prune", "2-recover", "table"]
    api.run_recipe(recipe, output=out)
    assert checksums(out) == checksums(whole)
    assert {folder.name for folder in out.iterdir()} == set(NAMES)


def test_a_second_run_on_one_output_is_refused(shared, out):
    with alone_in(out), pytest.raises(OutputError, match="another run works in"):
        api.run_recipe(recipe_of(shared), output=out)


def test_a_folder_that_no_step_made_is_not_replaced(refused, file, tmp_path):
    (tmp_path / "mine" / "1-prune").mkdir(parents=True)
    assert "exists already, and no step of a recipe made it" in refused("run", file, "-o", "{tmp}/mine")
    assert "that should hold 'out' does not exist" in refused("run", file, "-o", "{tmp}/none/out")


BEFORE = {
    "data": (("--set", "recover.data={tmp}/none.jsonl"), "step 2 (recover): {tmp}/none.jsonl: no such file"),
    "text": (("--set", "table.perplexity={tmp}/none.txt"), "step 3 (evaluate): {tmp}/none.txt: no such file"),
    "calibration": (("--set", "1.calibration={tmp}/none.txt"), "step 1 (prune): {tmp}/none.txt: no such file"),
    "layers": (("--set", "prune.layers=9"), "step 1 (prune): prune.layers 9: the model has the layers 0-3"),
    "an exporter": (("--set", "export.to=ggu"), "step 4 (export): unknown exporter 'ggu'; did you mean gguf?"),
    "a model": (("--model", "./none"), "model directory './none' does not exist"),
    "no tokenizer": (("--model", "{models}/bare"), "bare' brings no tokenizer, so the pruned model could read no text"),
    "a device": (("--device", "cud"), "device 'cud' cannot be used"),
    "memory": (("--max-memory", "1MB"), "step 1 (prune): --max-memory 1.0 MiB: "),
}


@pytest.mark.parametrize("what", BEFORE)
def test_mistakes_of_all_steps_are_found_before_any_work(what, refused, file, tmp_path):
    options, message = BEFORE[what]
    assert message.format(tmp=tmp_path) in refused("run", file, "-o", "{tmp}/out", *options)


def test_models_by_name_and_texts(shared, out):
    recipe = recipe_of(shared)
    recipe["steps"] = [
        *recipe["steps"][:2],
        {"generate": {"max_new_tokens": 2}, "prompt": "The fox", "models": ["dense", "last"], "name": "texts"},
        {"evaluate": {"metrics": "size"}, "models": ["1-prune"]},
        {"bench": {"batch": 1, "prompt": 8, "new": 2, "rounds": 1}, "name": "speed", "models": "last"},
    ]
    found = api.run_recipe(recipe, output=out)
    assert [step.skipped for step in found.steps] == [True, True, False, False, False]
    assert [one["name"] for one in found["texts"].result] == ["dense", "2-recover"]
    assert found["texts"].result[0]["prompt"] == "The fox"
    assert [one.name for one in found["4-evaluate"].value] == ["1-prune"]
    assert [model.name for model in found["speed"].value.cases[0].models] == ["2-recover"]
    assert found["speed"].result["cases"][0]["models"][0]["name"] == "2-recover"
    with pytest.raises(KeyError):
        found["none"]
    recipe["steps"][2]["prompt"] = "A cat"
    assert skipped(recipe, out) == [True, True, False, True, True]


def test_recipes_lists_them_and_prints_one(run):
    shown = run("recipes").out
    assert all(name in shown for name in ("paper", "quality", "gguf", "experts", "demo"))
    assert yaml.safe_load(run("recipes", "paper").out)["steps"][0]["prune"]["method"] == "llm-pruner"


def test_libraries_of_later_steps_are_missed_at_once(refused, file, monkeypatch):
    monkeypatch.setattr("llmpruner_gguf.find_spec", lambda name: True if name == "gguf" else None)
    quantised = ("--set", "export.to=gguf", "--set", "export.settings.gguf.quant=Q4_K_M")
    found = refused("run", file, "-o", "{tmp}/out", *quantised)
    assert "step 4 (export): llama-cpp-python, which quantises to q4_k_m, is not installed; run: pip install" in found
    monkeypatch.setattr("llmpruner.recovery.data.find_spec", lambda name: None)
    adapters = ("--set", "recover.strategy=lora")
    assert "step 2 (recover): peft is not installed" in refused("run", file, "-o", "{tmp}/out", *adapters)


@pytest.mark.parametrize(("change", "message"), [
    (lambda steps: [*steps, {"bench": {"runtime": "vllm"}}], "step 5 (bench): vllm is not installed"),
    (lambda steps: steps[:0:-1], "step 3 (recover): '{dense}' was not pruned by llmpruner"),
])  # fmt: skip
def test_what_a_step_cannot_do_is_refused_before_other_steps(refused, file, dense, change, message):
    """It was found by its own step, hours later."""
    recipe = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**recipe, "steps": change(recipe["steps"])}))
    assert message.format(dense=dense) in refused("run", file, "-o", "{tmp}/out")


def test_the_model_of_an_export_to_one_file_is_that_file(shared, tmp_path, catalog):
    steps = [{"export": {"to": "stock"}, "name": "file"}, {"evaluate": {"metrics": "size"}, "models": ["file"]}]
    recipe = Recipe.read({"steps": steps}, catalog)
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "run.json").write_text('{"step": {}}')
    opener = Opener(catalog, LoadSettings(), Progress())
    found = RecipeRun(recipe, shared / "dense", tmp_path, opener, RunSettings(), {})
    identities = set()
    for content in (b"one", b"another"):
        (tmp_path / "file" / "model.gguf").write_bytes(content)
        identities.add(found.inputs(recipe.steps[1])["models"]["file"])
    assert found.reference("file") == str(tmp_path / "file" / "model.gguf") and len(identities - {None}) == 2
