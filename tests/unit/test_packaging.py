"""pyproject.toml agrees with the package."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_package_is_shipped():
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.findall(r'"([^"]+)"', re.search(r"^packages = \[(.*?)\]", text, re.S | re.M)[1]))
    core = {str(f.parent.relative_to(ROOT)).replace("/", ".") for f in (ROOT / "llmpruner").rglob("__init__.py")}
    plugins = {f"llmpruner_{f.parent.name}" for f in (ROOT / "plugins").glob("*/__init__.py")}
    assert listed == core | plugins
