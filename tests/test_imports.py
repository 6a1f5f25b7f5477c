"""What is light stays light, what is public exists, and pyproject.toml, CI and the packages agree."""

import re
import subprocess
import sys
from pathlib import Path

import yaml
from fresh import run_fresh

import llmpruner

ROOT = Path(__file__).resolve().parents[1]
CI = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
HEAVY = {"torch", "transformers", "peft", "datasets", "accelerate", "safetensors", "lm_eval", "numpy"}
LIGHT = (
    "import llmpruner",
    "from llmpruner import ModelFamily, ImportanceCriterion, hookimpl, Signal",
    "import llmpruner_llama, llmpruner_vicuna, llmpruner_chatglm",
    "from llmpruner.cli.app import build_app",
    "app = build_app()",
    "app(['--help'], standalone_mode=False)",
    "app(['prune', '--help'], standalone_mode=False)",
    "from llmpruner import load_catalog; assert len(load_catalog()[ModelFamily]) > 2",
    # Its pydantic models take a third of the time in which the help must be there.
    "assert 'llmpruner.structure.plan' not in sys.modules",
    "import llmpruner.evaluation.metrics, llmpruner.recovery.base, llmpruner.recovery.strategies",
)


def test_nothing_heavy_is_imported():
    lines = "".join(f"{line}\nassert not {HEAVY} & set(sys.modules), {line!r}\n" for line in LIGHT)
    done = subprocess.run([sys.executable, "-c", f"import sys\n{lines}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_mistakes_are_answered_without_torch(tmp_path):
    """Whose import takes seconds."""
    (tmp_path / "config.json").write_text("{}")
    lines = [
        *(
            f"prune . -o out --ratio {more}"
            for more in ("20", "0.2 --method bst", "0.2 --importance l3", "0.2 --kinds heads")
        ),
        *("export . --to ggfu -o out", "evaluate . --metrics x", "bench . --runtime x"),
        *("prune none/ --ratio 0.2 -o out", "prune . --ratio 0.2 --calibration none.txt -o out", "prune . --rato 0.2"),
        *("run quolity -o out", "run quality --set prune.ratoi=1", "report none", "bench . --json config.json"),
    ]
    code = f"""if True:
        import sys
        from llmpruner.cli import main
        for line in {lines}:
            sys.argv = ["llmpruner", *line.split()]
            try:
                main()
            except SystemExit as end:
                print(end.code, sorted({HEAVY} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["2 []"] * len(lines), done.stderr
    assert done.stderr.count("error: ") == len(lines)


def test_a_prune_does_not_import_what_a_training_needs():
    """transformers' Trainer brings datasets, pandas and pyarrow, whose memory would count in every command."""
    done = run_fresh("import llmpruner.api, llmpruner.pipeline, sys\nprint(*sys.modules)")
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "llmpruner.pipeline" in loaded
    assert not loaded & {"transformers.trainer", "datasets", "pyarrow", "lm_eval", "gguf"}


def test_every_public_name_exists():
    assert len(llmpruner.__all__) > 50
    for name in llmpruner.__all__:
        assert getattr(llmpruner, name) is not None
    assert not hasattr(llmpruner, "nonsense")


def test_what_plugins_must_create_is_public():
    """The pages of the reference say that it is imported from llmpruner."""
    structure = (ROOT / "docs" / "reference" / "structure.md").read_text(encoding="utf-8")
    kinds = re.findall(r"`([A-Z]+)` \(`'", structure)
    assert len(kinds) == 8
    assert {*kinds, "Blocks", "Explicit", "index_map", "Cost", "Fit", "TrainingResult"} <= {*llmpruner.__all__}


def test_every_promised_python_is_tested():
    promised = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    # As text: without quotation marks, 3.10 is a number and means 3.1.
    assert yaml.safe_load(CI)["jobs"]["test"]["strategy"]["matrix"]["python"] == promised


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    called = re.findall(r"^(?:      - run: )?make (\w\S*)", CI + (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert {"test", "docs"} <= set(called)
    assert [target for target in called if not re.search(rf"^{re.escape(target)}:", makefile, re.M)] == []


def test_every_package_is_shipped():
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.findall(r'"([^"]+)"', re.search(r"^packages = \[(.*?)\]", text, re.S | re.M)[1]))
    core = {str(f.parent.relative_to(ROOT)).replace("/", ".") for f in (ROOT / "llmpruner").rglob("__init__.py")}
    plugins = {f"llmpruner_{f.parent.name}" for f in (ROOT / "plugins").glob("*/__init__.py")}
    assert listed == core | plugins


def test_every_other_file_is_shipped():
    text = (ROOT / "pyproject.toml").read_text().partition("[tool.setuptools.package-data]")[2]
    listed = dict(re.findall(r"^(llmpruner\w*) = \[(.*)\]", text, re.M))
    plugins = {f"llmpruner_{f.parent.name}": f.parent for f in (ROOT / "plugins").glob("*/__init__.py")}
    for package, folder in {"llmpruner": ROOT / "llmpruner", **plugins}.items():
        shipped = {f for pattern in re.findall(r'"([^"]+)"', listed.get(package, "")) for f in folder.glob(pattern)}
        assert shipped == {f for f in folder.rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc")}
