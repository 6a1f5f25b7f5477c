"""pyproject.toml agrees with the packages, and CI runs targets that exist on every supported Python."""

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / ".github" / "workflows" / "ci.yml"


def jobs() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))["jobs"]


def commands() -> list[str]:
    return [step["run"] for job in jobs().values() for step in job["steps"] if "run" in step]


def test_every_promised_python_is_tested():
    promised = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    # As text: without quotation marks, 3.10 is a number and means 3.1.
    assert jobs()["test"]["strategy"]["matrix"]["python"] == promised


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    texts = [*commands(), (ROOT / "README.md").read_text(encoding="utf-8")]
    called = [target for text in texts for target in re.findall(r"^make (\w\S*)", text, re.M)]
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
