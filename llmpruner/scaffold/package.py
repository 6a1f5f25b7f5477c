"""Rendering and writing a plugin package."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import LlmprunerError, UnknownNameError
from ..files import new_directory

if TYPE_CHECKING:
    from ..plugins.catalog import Kind

FILES = {
    "pyproject.toml": "pyproject.toml.j2",
    "README.md": "README.md.j2",
    "src/{module}/__init__.py": "init.py.j2",
    "src/{module}/{kind}.py": "{kind}.py.j2",
    "tests/test_{kind}.py": "test_{kind}.py.j2",
}
"""Path in the package → template, both with placeholders for the names of the module and of the kind."""

KINDS = {"family": "families", "criterion": "criteria", "strategy": "strategies"}
"""What a package can add → the attribute of `Catalog` with the components of that kind."""

PREFIX = "llmpruner-"
_NAME = re.compile(rf"(?!{PREFIX})[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True, slots=True)
class PluginName:
    """The word that all names in a plugin package are derived from."""

    word: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.word):
            raise LlmprunerError(
                f"'{self.word}' cannot name a plugin; expected lower case letters, digits and single dashes, a letter "
                f"first, as in 'my-model'; '{PREFIX}' is added"
            )

    @property
    def distribution(self) -> str:
        return PREFIX + self.word

    @property
    def module(self) -> str:
        return self.distribution.replace("-", "_")


@dataclass(frozen=True)
class ModelFacts:
    """Facts for the templates. ``model_type``: empty without a model. ``config_values``: of the small configuration, as
    JSON values. ``package``: registers the architecture; ``requires``: its distribution. ``kinds``: of units that can
    be removed."""

    model_type: str = ""
    config_class: str = ""
    config_module: str = ""
    config_values: Mapping[str, Any] = field(default_factory=dict)
    package: str | None = None
    requires: str | None = None
    kinds: tuple[str, ...] = ()


def kind_named(word: str) -> Kind[Any]:
    """The kind of component that ``word`` of `KINDS` names. Raises `UnknownNameError`."""
    from ..plugins.catalog import Catalog

    if word not in KINDS:
        raise UnknownNameError("kind of plugin", word, KINDS)
    kind: Kind[Any] = getattr(Catalog, KINDS[word])
    return kind


def render(name: PluginName, model: ModelFacts | None = None, *, kind: str = "family") -> dict[str, str]:
    """Path in the package → text. ``kind``: one of `KINDS`. ``model``: of a family; other kinds take none."""
    from jinja2 import Environment, StrictUndefined

    adds = kind_named(kind)
    if model is not None and kind != "family":
        raise LlmprunerError(f"a {kind} works for all models; leave the model out")
    model = model or ModelFacts()
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    folder = resources.files("llmpruner.scaffold") / "templates"
    values = {
        "name": name,
        "model": model,
        "version": __version__,
        "word": kind,
        "kind": adds,
        "cls": "".join(part.capitalize() for part in (*name.word.split("-"), kind)),
    }
    files = {
        path.format(module=name.module, kind=kind): environment.from_string(
            (folder / template.format(kind=kind)).read_text(encoding="utf-8")
        ).render(values)
        for path, template in FILES.items()
    }
    if model.config_values:
        files["tests/config.json"] = json.dumps(model.config_values, indent=2, ensure_ascii=False) + "\n"
    return files


def write(directory: Path, files: dict[str, str]) -> None:
    """Write ``files`` to the new ``directory``, completely or not at all. Raises `OutputError`."""
    with new_directory(directory) as partial:
        for path, text in files.items():
            file = partial / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
