"""Reading recipe files: what they mean, and what is refused, in one line with the place."""

from __future__ import annotations

import re

import pytest

from llmpruner import LoadSettings, NamedRecipe, Recipe, SettingsError, UnknownNameError, api, hookimpl
from llmpruner.recipes.commands import COMMANDS
from llmpruner.recipes.recipe import values_of
from llmpruner.recipes.yaml_file import read_yaml
from llmpruner.testing import catalog_with

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
    recipe = Recipe.read(file)
    return recipe.with_values(values) if values else recipe


def test_a_file_means_what_the_commands_mean(tmp_path, catalog):
    recipe = read(GOOD, tmp_path)
    assert (recipe.model, str(recipe.output)) == ("some/model", "out")
    assert recipe.load == LoadSettings(dtype="bfloat16")
    assert [step.name for step in recipe.steps] == ["1-prune", "trained", "3-evaluate", "4-export"]
    prune, recover, evaluate, export = recipe.check(catalog)
    assert (prune.kinds, prune.layers, prune.amount) == (("mlp", "attention"), "3", 0.2)
    assert recover.settings.learning_rate == 2e-4 and recover.strategy.name == "distil"
    assert [metric.name for metric in evaluate.metrics] == ["size", "perplexity"]
    assert export.name == "gguf"
    assert [recipe.sources(step) for step in recipe.steps] == [
        ("dense",),
        ("1-prune",),
        ("dense", "1-prune", "trained"),
        ("trained",),
    ]


def test_the_same_from_python():
    recipe = Recipe.of({"steps": [{"prune": {"ratio": 0.2, "layers": [1, 2]}}, {"evaluate": None, "models": "last"}]})
    assert recipe.steps[0].settings.layers == "1,2"
    assert recipe.sources(recipe.steps[1]) == ("1-prune",)


def test_rounds_are_steps_of_their_own():
    steps = [{"rounds": 2, "steps": [{"prune": {"ratio": 0.1}}, {"recover": {"data": "a"}}]}, "evaluate"]
    recipe = Recipe.of({"steps": steps})
    assert [step.name for step in recipe.steps] == ["1-prune", "2-recover", "3-prune", "4-recover", "5-evaluate"]
    assert recipe.sources(recipe.steps[2]) == ("2-recover",)
    changed = recipe.with_values({"3.ratio": 0.3, "recover.settings.lora.rank": 4})
    assert [step.given.get("ratio") for step in changed.steps] == [0.1, None, 0.3, None, None]
    assert changed.steps[1].given["settings"] == {"lora": {"rank": 4}} == changed.steps[3].given["settings"]
    assert "settings" not in recipe.steps[1].given, "the recipe itself stays as it is"


def test_values_on_the_command_line_are_read_as_in_a_file():
    texts = ["prune.ratio=0.3", "prune.kinds=[mlp]", "recover.data=3*a.jsonl,1*b.jsonl", "2.settings.lora.rank=4"]
    assert values_of([*texts, "recover.pack=true", "recover.limit=null", "1.calibration=*", "1.method=a: b"]) == {
        "prune.ratio": 0.3,
        "prune.kinds": ["mlp"],
        "recover.data": "3*a.jsonl,1*b.jsonl",
        "2.settings.lora.rank": 4,
        "recover.pack": True,
        "recover.limit": None,
        "1.calibration": "*",
        "1.method": "a: b",
    }
    for wrong in ("ratio=0.3", "prune.ratio", ".ratio=1"):
        with pytest.raises(SettingsError, match=r"expected STEP\.setting=value"):
            values_of([wrong])


STEPS = "steps:\n  - prune: {ratio: 0.2}\n"
WRONG = {
    "nothing": ("", "r.yaml: expected a mapping with 'steps'"),
    "no steps": ("model: x", "r.yaml, line 1: expected a list of steps under 'steps'"),
    "an empty list": ("steps: []", "r.yaml, line 1: expected at least one step"),
    "no YAML": ("steps: [", "r.yaml, line 1: not valid YAML: expected the node content"),
    "two documents": ("a: 1\n---\nb: 2\n", "r.yaml, line 2: not valid YAML: but found another document"),
    "a zero byte": ("a: \x00", "r.yaml: not valid YAML: "),
    "a key twice": (
        "steps:\n  - prune:\n      ratio: 0.2\n      ratio: 0.3\n",
        "r.yaml, line 4: 'ratio' is given twice, in line 3 too; keep one",
    ),
    "a step twice": (STEPS + "steps: []\n", "r.yaml, line 3: 'steps' is given twice, in line 1 too"),
    "a key at the top": ("modle: x\n" + STEPS, "r.yaml, line 1: a recipe has no key 'modle'; did you mean model?"),
    "an object": ("model: !!python/object:os.system {}\n" + STEPS, "r.yaml, line 1: a tag 'tag:yaml.org"),
    "a function": ("model: !!python/name:os.system\n" + STEPS, "r.yaml, line 1: not valid YAML: could not determine"),
    "no day": ("model: 2024-13-45\n" + STEPS, "r.yaml, line 1: '2024-13-45' cannot be read: month must be in 1..12"),
    "itself": ("steps: &a\n  - *a\n", "r.yaml, line 1: a value contains itself"),
    "a list as a key": ("[a]: 1\n" + STEPS, "r.yaml, line 1: expected a name before the colon"),
    "a command": (
        "steps:\n  - prune: {ratio: 0.2}\n  - recovr: {data: x}\n",
        "r.yaml, line 3: a step has no key 'recovr'; did you mean recover",
    ),
    "two commands": (
        "steps:\n  - prune: {ratio: 0.2}\n    evaluate: {}\n", "r.yaml, line 2: a step has 2 commands (prune, evaluate)"
    ),
    "no command": ("steps:\n  - name: a\n", "r.yaml, line 2: a step has no command; expected one of prune, recover"),
    "a number as a step": ("steps:\n  - 3\n", "r.yaml, line 2: expected a step: a command"),
    "a list of settings": ("steps:\n  - prune: [ratio]\n", "r.yaml, line 2: prune: expected a mapping of its settings"),
    "a setting": (
        "steps:\n  - prune:\n      ratio: 0.2\n      rond_to: 8\n",
        "r.yaml, line 4, step 1 (prune): prune has no key 'rond_to'; did you mean round_to",
    ),
    "out of bounds": (
        "steps:\n  - prune:\n      steps: 2\n      ratio: 1.5\n",
        "r.yaml, line 4, step 1 (prune): ratio: 1.5: expected a number below 1",
    ),
    "a choice": (
        "steps:\n  - prune: {ratio: 0.2, shape: unifrom}\n",
        "step 1 (prune): shape: 'unifrom': expected one of uniform, free; did you mean uniform?",
    ),
    "required": (STEPS + "  - export: {quant: q8_0}\n", "r.yaml, line 3, step 2 (export): 'to' must be given"),
    "loading": ("load: {dtyp: auto}\n" + STEPS, "r.yaml, line 1: load has no key 'dtyp'; did you mean dtype?"),
    "a model's type": ("model: [a]\n" + STEPS, "r.yaml, line 1: model: 'a': expected text"),
    "a name": (STEPS + "    name: a/b\n", "r.yaml, line 3: name: 'a/b': expected a name of letters, digits, - and _"),
    "a reserved name": (STEPS + "    name: dense\n", "r.yaml, line 3: the name 'dense' has a meaning of its own"),
    "a name twice": (
        STEPS + "    name: a\n  - evaluate:\n    name: a\n", "r.yaml, line 5: step 1 is named 'a' too; choose another"
    ),
    "a name in rounds": (
        "steps:\n  - rounds: 2\n    steps:\n      - prune: {ratio: 0.1}\n        name: a\n",
        "line 4: 'a' would be the name of 2 steps",
    ),
    "no rounds": (
        "steps:\n  - rounds: 0\n    steps: [evaluate]\n", "r.yaml, line 2: rounds: '0': expected a whole number"
    ),
    "models of a prune": (
        STEPS + "    models: dense\n", "r.yaml, line 3: 'models' has no effect on prune; leave it out"
    ),
    "no prompt": ("steps:\n  - generate:\n", "r.yaml, line 2: a step of generate needs a 'prompt' beside it"),
    "an unknown model": (
        STEPS + "    name: pruned\n  - evaluate:\n    models: [dense, prund]\n",
        "r.yaml, line 4, step 2 (evaluate): models: unknown model 'prund'; did you mean pruned?",
    ),
    "a later model": (
        "steps:\n  - evaluate:\n    models: 2-prune\n  - prune: {ratio: 0.2}\n", "models: unknown model '2-prune'"
    ),
    "nothing to export": (
        "steps:\n  - export: {to: stock}\n", "step 1 (export): no step before it makes a checkpoint"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_mistake_is_one_line_with_its_place(what, tmp_path):
    text, message = WRONG[what]
    with pytest.raises(SettingsError) as error:
        read(text, tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


EFFECTLESS = {
    "an unknown component": (
        "prune: {ratio: 0.2, importance: tailor}", "unknown criterion 'tailor'; did you mean taylor?"
    ),
    "no effect": ("prune: {unit_ratio: 0.2, meet: above}", "meet has no effect with unit_ratio"),
    "a negated one": ("recover: {data: a, strategy: full, merge: false}", "merge: false has no effect with recovery"),
    "a component's setting": ("prune: {ratio: 0.2, settings: {taylor: {a: 1}}}", "settings taylor.… has no effect"),
    "an unknown setting of one": (
        "prune: {ratio: 0.2, settings: {refit: {a: 1}}}", "compensation refit has no setting 'a'; it has:"
    ),
    "a comparison with nothing": ("evaluate: {kl: true}", "metric perplexity compares models with the first one"),
}  # fmt: skip


@pytest.mark.parametrize("what", EFFECTLESS)
def test_what_the_commands_refuse_is_refused_with_its_place(what, tmp_path, catalog):
    step, message = EFFECTLESS[what]
    recipe = read(f"steps:\n  - {step}\n", tmp_path)
    command = step.partition(":")[0]
    with pytest.raises(Exception, match=re.escape(message)) as error:
        recipe.check(catalog)
    start = str(tmp_path / "r.yaml") + f", line 2, step 1 ({command}): "
    assert str(error.value).startswith(start) and str(error.value).count("line 2") == 1


def test_a_step_that_is_not_there(tmp_path):
    with pytest.raises(SettingsError, match=r"prun\.ratio: unknown step 'prun'; did you mean prune or 1-prune"):
        read(STEPS, tmp_path, **{"prun.ratio": 0.3})


def test_a_recipe_that_is_not_there(tmp_path, catalog):
    with pytest.raises(SettingsError, match=r"recipe file '.*none\.yaml' does not exist"):
        Recipe.read(tmp_path / "none.yaml", catalog)
    with pytest.raises(UnknownNameError, match="unknown recipe 'papr'; did you mean paper"):
        Recipe.read("papr", catalog)
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9\n")
    with pytest.raises(SettingsError, match=r"latin\.yaml cannot be read: 'utf-8' codec"):
        Recipe.read(tmp_path / "latin.yaml")
    with pytest.raises(SettingsError, match="names no model; add 'model: …'"):
        api.dry_run({"steps": ["evaluate"]}, output=tmp_path / "out")
    with pytest.raises(SettingsError, match="names no output; add 'output: …'"):
        api.dry_run({"steps": ["evaluate"]}, model="x")


def test_every_shipped_recipe_is_valid(catalog):
    found = {name: Recipe.read(name, catalog) for name, _ in catalog.recipes.items()}
    assert set(found) >= {"paper", "quality", "llama-cpp", "experts", "demo"}
    for name, recipe in found.items():
        assert len(recipe.check(catalog)) == len(recipe.steps) > 2, name
        assert recipe.model == ("demo" if name == "demo" else None) and recipe.output is None
        assert catalog.recipes.package_of(name) == "llmpruner"


def test_a_plugin_ships_a_recipe():
    class Twice(NamedRecipe):
        name = "twice"
        summary = "two rounds"

        def text(self):
            return "steps:\n  - rounds: 2\n    steps:\n      - prune: {ratio: 0.1}\n"

    class Plugin:
        @hookimpl
        def llmpruner_recipes(self):
            return [Twice]

    catalog = catalog_with(Plugin())
    recipe = Recipe.read("twice", catalog)
    assert [step.name for step in recipe.steps] == ["1-prune", "2-prune"] and recipe.source == "recipe twice"


def test_every_command_has_the_settings_of_the_command_line():
    for name, command in COMMANDS.items():
        assert command.settings.__name__ == f"{name.title()}Settings"


def test_words_and_numbers_are_those_of_yaml_1_2():
    text = "a: on\nb: off\nc: 1:2\nd: 2e-4\ne: true\nf: 1_000\ng: 010\nh: 1.5\ni: -3\nj: no"
    expected = {
        "a": "on",
        "b": "off",
        "c": "1:2",
        "d": 2e-4,
        "e": True,
        "f": 1000,
        "g": "010",
        "h": 1.5,
        "i": -3,
        "j": "no",
    }
    assert read_yaml(text, "r.yaml")[0] == expected
    assert values_of(["recover.gradient_checkpointing=off", "prune.layers=1:2"]) == {
        "recover.gradient_checkpointing": "off", "prune.layers": "1:2",
    }  # fmt: skip
    for given in ("on", "off"):
        recipe = Recipe.of({"steps": [{"prune": {"ratio": 0.1}}, {"recover": {"gradient_checkpointing": given}}]})
        assert recipe.steps[1].given["gradient_checkpointing"] == given
