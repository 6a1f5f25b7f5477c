"""Reading recipe files: what they mean, and what is refused, in one line with the place."""

import pytest

from llmpruner import LlmprunerError, LoadSettings, NamedRecipe, SettingsError, api, load_catalog
from llmpruner.cli.run import values_of
from llmpruner.errors import PluginError, UnknownNameError
from llmpruner.models.reference import data_identity
from llmpruner.recipes.recipe import Recipe

GOOD = """\
model: some/model
output: out
load: {dtype: bfloat16}
steps:
  - prune:
      ratio: 0.2
      kinds: [mlp, attention]
      layers: 3
  - recover: {data: a.jsonl, learning_rate: 2e-4}
    name: trained
  - evaluate
  - export: {to: gguf}
"""


def read(text: str, tmp_path, **values) -> Recipe:
    file = tmp_path / "r.yaml"
    file.write_text(text, encoding="utf-8")
    return Recipe.read(file, load_catalog(), values)


def test_a_file_means_what_the_commands_mean(tmp_path):
    recipe = read(GOOD, tmp_path)
    assert (recipe.model, str(recipe.output)) == ("some/model", "out")
    assert recipe.load == LoadSettings(dtype="bfloat16")
    assert [step.name for step in recipe.steps] == ["1-prune", "trained", "3-evaluate", "4-export"]
    prune, recover, evaluate, export = (step.job for step in recipe.steps)
    assert (prune.kinds, prune.layers, prune.amount) == (("mlp", "attention"), "3", 0.2)
    assert recover.settings.learning_rate == 2e-4 and recover.strategy.name == "distil"
    assert [metric.name for metric in evaluate] == ["size", "perplexity"]
    assert export.name == "gguf"
    reads = [("dense",), ("1-prune",), ("dense", "1-prune", "trained"), ("trained",)]
    assert [step.reads for step in recipe.steps] == reads


def test_the_same_from_python(catalog):
    steps = [{"prune": {"ratio": 0.2, "layers": [1, 2]}}, {"evaluate": None, "models": "last"}]
    recipe = Recipe.read({"steps": steps}, catalog)
    assert recipe.steps[0].settings.layers == "1,2"
    assert recipe.steps[1].reads == ("1-prune",)


def test_rounds_are_steps_of_their_own(catalog):
    steps = [{"rounds": 2, "steps": [{"prune": {"ratio": 0.1}}, {"recover": {"data": "a"}}]}, "evaluate"]
    recipe = Recipe.read({"steps": steps}, catalog)
    assert [step.name for step in recipe.steps] == ["1-prune", "2-recover", "3-prune", "4-recover", "5-evaluate"]
    assert recipe.steps[2].reads == ("2-recover",)
    changed = Recipe.read({"steps": steps}, catalog, values={"3.ratio": 0.3, "recover.settings.distil.rank": 4})
    assert [step.settings.given().get("ratio") for step in changed.steps] == [0.1, None, 0.3, None, None]
    assert changed.steps[1].settings.settings == {"distil": {"rank": 4}} == changed.steps[3].settings.settings
    assert Recipe.read({"steps": steps}, catalog) == recipe, "the mapping itself stays as it is"


def test_values_on_the_command_line_are_read_as_in_a_file():
    texts = ["prune.ratio=0.3", "prune.kinds=[mlp]", "recover.data=3*a.jsonl,1*b.jsonl", "2.settings.lora.rank=4"]
    assert values_of([*texts, "generate.chat=true", "recover.limit=null", "1.calibration=*"]) == {
        "prune.ratio": 0.3,
        "prune.kinds": ["mlp"],
        "recover.data": "3*a.jsonl,1*b.jsonl",
        "2.settings.lora.rank": 4,
        "generate.chat": True,
        "recover.limit": None,
        "1.calibration": "*",
    }
    with pytest.raises(SettingsError, match=r"expected STEP\.setting=value"):
        values_of(["prune.ratio"])


STEPS = "steps: [prune: {ratio: 0.2}]"
WRONG = {
    "nothing": ("", "r.yaml: expected a mapping of settings, got 'None'"),
    "no steps": ("model: x", "r.yaml: steps must be given"),
    "no YAML": ("steps: [", "r.yaml, line 1: not valid YAML: expected the node content"),
    "an object": ("model: !!python/object:os.system {}\n" + STEPS, "r.yaml, line 1: not valid YAML: could not"),
    "a key at the top": ("modle: x\n" + STEPS, "r.yaml: unknown setting 'modle'; did you mean model?"),
    "a command": ("steps: [prune: {ratio: 0.2}, recovr: {data: x}]", "export, got 'recovr'; did you mean recover"),
    "a list of settings": ("steps: [prune: [ratio]]", "r.yaml, step 1 (prune): expected a mapping of settings"),
    "two commands": ("steps: [{prune: {ratio: 0.2}, evaluate: }]", "step 1 (prune): unknown setting 'evaluate'"),
    "a setting": ("steps: [prune: {ratio: 0.2, rond_to: 8}]", "step 1 (prune): unknown setting 'rond_to'; did you"),
    "out of bounds": ("steps: [prune: {ratio: 1.5}]", "r.yaml, step 1 (prune): ratio 1.5: input should be less than 1"),
    "required": ("steps: [evaluate, export: {settings: {}}]", "r.yaml, step 2 (export): to must be given"),
    "a name": ("steps: [{prune: {ratio: 0.2}, name: a/b}]", "name 'a/b': string should match pattern"),
    "a name twice": ("steps: [{evaluate: , name: a}, {evaluate: , name: a}]", "step 2 (evaluate): name: 'a' is taken"),
    "an unknown model": (
        "steps: [{prune: {ratio: 0.2}, name: pruned}, {evaluate: , models: [dense, prund]}]",
        "r.yaml, step 2 (evaluate): models: unknown model 'prund'; did you mean pruned?",
    ),
    "models of an export": ("steps: [{export: {to: gguf}, models: dense}]", "(export): 'models' belongs to evaluate, "),
    "a step beside rounds": ("steps: [{rounds: 2, steps: [evaluate], prune: }]", "rounds: unknown setting 'prune'"),
    "a later model": ("steps: [{evaluate: , models: 2-prune}, prune: {ratio: 0.2}]", "unknown model '2-prune'"),
    "a comparison with nothing": (
        "steps: [evaluate: {kl: true}]", "r.yaml, step 1 (evaluate): metric perplexity compares models with the first"
    ),
    "an unknown setting of one": (
        "steps: [prune: {ratio: 0.2, settings: {refit: {a: 1}}}]", "step 1 (prune): compensation refit: unknown setting"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_mistake_is_one_line_with_its_place(what, tmp_path):
    text, message = WRONG[what]
    with pytest.raises(LlmprunerError) as error:
        read(text, tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_values_that_replace_nothing(tmp_path):
    with pytest.raises(SettingsError, match=r"prun\.ratio: unknown step 'prun'; did you mean prune or 1-prune"):
        read(STEPS, tmp_path, **{"prun.ratio": 0.3})
    with pytest.raises(SettingsError, match=r"\(prune\): ratio {'x': 0\.3}: input should be a valid number"):
        read(STEPS, tmp_path, **{"prune.ratio.x": 0.3})
    for key in ("prune", "ratio", ".ratio"):
        with pytest.raises(SettingsError, match=r"expected STEP\.setting, such as prune\.ratio"):
            read(STEPS, tmp_path, **{key: {"ratio": 0.3}})


def test_a_recipe_that_is_not_there(tmp_path, catalog):
    with pytest.raises(SettingsError, match=r"recipe file '.*none\.yaml' does not exist"):
        Recipe.read(tmp_path / "none.yaml", catalog)
    with pytest.raises(UnknownNameError, match="unknown recipe 'papr'; did you mean paper"):
        Recipe.read("papr", catalog)
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9\n")
    with pytest.raises(SettingsError, match=r"latin\.yaml cannot be read: 'utf-8' codec"):
        Recipe.read(tmp_path / "latin.yaml", catalog)
    with pytest.raises(SettingsError, match="names no model; add 'model: …'"):
        api.run_recipe({"steps": ["evaluate"]}, output=tmp_path / "out")
    with pytest.raises(SettingsError, match="names no output; add 'output: …'"):
        api.run_recipe({"steps": ["evaluate"]}, model="x")


def test_every_shipped_recipe_is_valid(catalog):
    for name in catalog[NamedRecipe]:
        recipe = Recipe.read(name, catalog)
        assert len(recipe.steps) > 1, name
        assert recipe.model == ("demo" if name == "demo" else None) and recipe.output is None


def test_a_folder_that_a_setting_names_is_known_by_its_files(tmp_path, catalog):
    """As the folder of lm-eval's task files is."""
    steps = [{"evaluate": {"tasks": "own", "settings": {"tasks": {"include_path": str(tmp_path)}}}}]
    (step,) = Recipe.read({"steps": steps}, catalog).steps
    file = tmp_path / "own.yaml"
    identities = []
    for text in ("task: own", "task: other"):
        file.write_text(text)
        identities.append(data_identity(step.settings.given(), step.job))
    assert identities[0].keys() == identities[1].keys() == {str(file)} and identities[0] != identities[1]


def test_a_named_recipe_without_its_file_is_a_broken_plugin(tmp_path):
    recipe = type("Twice", (NamedRecipe,), {"name": "twice", "path": tmp_path / "twice.yaml"})()
    with pytest.raises(PluginError, match=r"recipe twice has no file: .*No such file"):
        recipe.text()
