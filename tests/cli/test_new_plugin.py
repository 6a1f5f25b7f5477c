"""``llmpruner new-plugin``: what it writes is installed as a user would and tested with its own tests, untouched."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fresh import run_fresh

import llmpruner
from llmpruner.scaffold.package import PACKAGES, ModelFacts, write_package

COMPOSED = Path(__file__).parents[1] / "discovery" / "composed.py"
LONG = "abcdefghij-abcdefghij-abcdefgh"
RUN = """
import os, sys
site, *options = sys.argv[1:]
# Where a process finds packages from its start on, and the processes that it starts.
sys.path.insert(0, site)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
import pytest
sys.exit(pytest.main(options))
"""


def install(site: Path, *sources: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", site, *sources], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr


def run_tests(site: Path, *packages: Path, choose: str) -> str:
    """The last line of what pytest says of the packages' own tests, run where they are installed."""
    options = ("-q", "-p", "no:cacheprovider", "-k", choose, *packages)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = run_fresh(RUN, site, *options, folder=packages[0].parent, environment=environment, timeout=250)
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_plugins_of_every_kind_pass_their_own_tests(run, tmp_path):
    packages = [tmp_path / f"llmpruner-my-{kind}" for kind in PACKAGES]
    for package, kind in zip(packages, PACKAGES, strict=True):
        model = ("--from", "gpt_neox") if kind == "family" else ()
        done = run("new-plugin", f"my-{kind}", "--kind", kind, *model, "-o", package)
        assert done.code == 0, done.err
        assert ("can remove: attention, mlp, vocabulary, layer" in done.out) == (kind == "family")
    code = (packages[0] / "src" / "llmpruner_my_family" / "family.py").read_text()
    assert 'model_types = ("gpt_neox",)' in code
    install(tmp_path / "site", *packages)
    # The cuts of the family were proved when it was written.
    quick = "recognises or found or entry_point or finite or trains or interrupted"
    assert run_tests(tmp_path / "site", *packages, choose=quick).startswith("7 passed")


@pytest.mark.slow
def test_a_plugin_for_an_architecture_without_one(run, tmp_path, monkeypatch):
    site, info = tmp_path / "architecture", tmp_path / "architecture" / "composed_models-0.1.0.dist-info"
    info.mkdir(parents=True)
    shutil.copyfile(COMPOSED, site / "composed.py")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: composed-models\nVersion: 0.1.0\n")
    (info / "top_level.txt").write_text("composed\n")
    monkeypatch.syspath_prepend(str(site))
    package = tmp_path / "llmpruner-odd"
    done = run("new-plugin", "odd", "--from", "composed", "--import", "composed", "-o", package)
    assert done.code == 0, done.err
    project = (package / "pyproject.toml").read_text()
    assert '  "llmpruner>=' in project and '  "composed-models",\n' in project
    assert '[project.entry-points."llmpruner.models"]\nodd = "composed"' in project
    install(tmp_path / "site", package)
    shutil.copytree(site, tmp_path / "site", dirs_exist_ok=True)
    quick = "recognises or cut_equals or agree or found or may_name"
    assert run_tests(tmp_path / "site", package, choose=quick).startswith("5 passed")
    # A pruned checkpoint names the module of its class: importing it is for the plugin to allow.
    code = """if True:
        import sys
        from llmpruner.models.modeling_llmpruner import packages_of_models
        sys.path.insert(0, sys.argv[1])
        print("composed" in packages_of_models(), "antigravity" in packages_of_models())
    """
    for folder, expected in ((tmp_path / "site", "True False"), (site, "False False")):
        done = run_fresh(code, folder)
        assert done.stdout.strip() == expected, done.stderr


def check_style(package: Path, cache: Path) -> None:
    """ruff and strict mypy. llmpruner is read from this checkout; errors of mypy in it do not count. transformers is
    not read, which would take longer than all else. ``cache``: what mypy has read, for all packages."""
    config = cache / f"{package.name}.toml"
    unread = '[[tool.mypy.overrides]]\nmodule = ["transformers.*", "odd.*"]\nfollow_imports = "skip"\n'
    unread += "ignore_missing_imports = true\n"
    config.write_text(f'[tool.mypy]\nstrict = true\nfiles = ["src", "tests"]\nmypy_path = "src"\n{unread}')
    environment = {**os.environ, "MYPYPATH": str(Path(llmpruner.__file__).parents[1])}
    for command in (
        ["ruff", "check", "--no-cache", "--select=E,F,W,I,UP,B,SIM,RUF", "--line-length=120"],
        ["ruff", "format", "--check", "--no-cache", "--line-length=120"],
        ["mypy", "--config-file", config, "--follow-imports=silent", "--cache-dir", cache],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=package, env=environment, capture_output=True, text=True, timeout=250
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.long
def test_what_is_written_passes_ruff_and_strict_mypy(tmp_path):
    (tmp_path / "mypy").mkdir()
    odd = ModelFacts("odd", "OddConfig", "odd", {"hidden_size": 8}, "odd", "odd-models", ("mlp",))
    for name, model, kind in (
        ("bare", ModelFacts(), "family"),
        (LONG, odd, "family"),
        (LONG, ModelFacts(), "criterion"),
        (LONG, ModelFacts(), "strategy"),
    ):
        package = tmp_path / f"{name}-{kind}"
        write_package(package, name, model, kind=kind)
        check_style(package, tmp_path / "mypy")


def test_without_a_model_the_tests_name_what_is_missing(run, tmp_path):
    package = tmp_path / "llmpruner-bare"
    assert run("new-plugin", "bare", "-o", package).code == 0
    files = {f.name for f in package.rglob("*") if f.is_file()}
    assert files == {"README.md", "pyproject.toml", "__init__.py", "family.py", "test_family.py"}
    assert "pytest.skip(" in (package / "tests" / "test_family.py").read_text()


def test_a_family_that_matches_already_is_named(run, dense, tmp_path):
    source = shutil.copytree(dense, tmp_path / "vicuna-7b-v1.5")
    done = run("new-plugin", "mine", "--from", source, "-o", tmp_path / "out")
    assert done.code == 2 and "derive your family from VicunaFamily of llmpruner_vicuna" in done.err


@pytest.mark.parametrize(("arguments", "message"), [
    ("Big", "cannot name a plugin; expected lower case letters"),
    ("llmpruner-own", "'llmpruner-' is added"),
    ("llama", "a family 'llama' exists already in llmpruner"),
    ("giraffe --from unheard_of", "neither a model directory nor a model type that transformers knows"),
    ("giraffe --from llama --import no_such_package", "--import no_such_package: ModuleNotFoundError"),
    ("giraffe --from ./nowhere", "model directory './nowhere' does not exist"),
    ("giraffe --from llama --kind strategy", "a strategy works for all models; leave --from out"),
    ("giraffe --import json", "--import goes with --from"),
    ("giraffe -o {tmp}", "exists already"),
])  # fmt: skip
def test_what_is_refused(refused, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused("new-plugin", *arguments.split())


def test_a_checkpoint_with_code_is_told_of_the_option_that_exists(refused, tmp_path):
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "wren", "auto_map": auto}), encoding="utf-8")
    said = refused("new-plugin", "wren", "--from", tmp_path, "-o", tmp_path / "out")
    assert said.endswith("name it with --import") and not (tmp_path / "out").exists()
