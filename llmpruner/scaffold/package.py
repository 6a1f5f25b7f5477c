"""``llmpruner new-plugin``: describe a model, and write a plugin package for it."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__
from ..catalog import Catalog
from ..errors import LlmprunerError, ModelError, UnsupportedModelError, first_line
from ..files import new_directory
from ..settings import LoadSettings

PACKAGES = {"family": "family", "criterion": "criterion", "strategy": "recovery strategy"}
"""What a package can add → the kind of component, as the catalog names it."""

_PROVENANCE = ("model_type", "transformers_version", "architectures", "auto_map", "_name_or_path", "dtype")


def distribution_of(name: str) -> str:
    """``llmpruner-odd`` for the plugin ``odd``. Raises `LlmprunerError` for a word that cannot name a plugin."""
    if not re.fullmatch(r"(?!llmpruner-)[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        expected = "lower case letters, digits and single dashes, a letter first, as in 'my-model'"
        raise LlmprunerError(f"'{name}' cannot name a plugin; expected {expected}; 'llmpruner-' is added")
    return f"llmpruner-{name}"


@dataclass(frozen=True)
class ModelFacts:
    """What the templates say about the model of a family. ``config_values``: of a small configuration. ``package``:
    registers the architecture with transformers; ``requires``: its distribution. ``kinds``: of removable units."""

    model_type: str = ""
    config_class: str = ""
    config_module: str = ""
    config_values: Mapping[str, Any] = field(default_factory=dict)
    package: str | None = None
    requires: str | None = None
    kinds: tuple[str, ...] = ()


def describe(source: str, catalog: Catalog, *, package: str | None = None) -> ModelFacts:
    """The facts of ``source``: a model, or a model type that transformers knows once ``package`` is imported. Raises
    `ModelError`, and `UnsupportedModelError` when a family matches it already, or its structure is not proved."""
    from ..discovery.opening import family_for
    from ..discovery.oracle import VERIFIED
    from ..discovery.verify import check_kinds, representative
    from ..models.family import AUTO
    from ..models.messages import quiet_transformers

    distribution = _import(package) if package else None
    with quiet_transformers():
        config = _config_of(source, catalog)
        family = family_for(catalog, config)
        if family.name != AUTO:
            hint = f"leave --from out, and derive your family from {type(family).__name__} of {type(family).__module__}"
            raise UnsupportedModelError(f"these models have the family '{family.name}' already; {hint}")
        small, graph = representative(config, family)
        values = {n: value for n, value in json.loads(small.to_json_string()).items() if n not in _PROVENANCE}
        verdicts = check_kinds(family, small, graph)
        for wrong in (verdict for verdict in verdicts if verdict.verdict != VERIFIED):
            what = f"cutting {wrong.kind} units of {small.model_type}"
            raise UnsupportedModelError(f"{what} is {wrong.verdict}: {wrong.reason}")
        kinds, cls = tuple(verdict.kind for verdict in verdicts), type(config)
        return ModelFacts(config.model_type, cls.__name__, cls.__module__, values, package, distribution, kinds)


def _config_of(source: str, catalog: Catalog) -> Any:
    """The dense configuration of a model, or the default one of a model type."""
    from transformers import CONFIG_MAPPING

    from ..discovery.opening import Opener, register_models

    register_models(catalog)
    if not Path(source).exists():
        if source in CONFIG_MAPPING:
            return CONFIG_MAPPING[source]()
        if source.isidentifier():
            unknown = f"'{source}' is neither a model directory nor a model type that transformers knows"
            raise ModelError(f"{unknown}; --import PACKAGE names the package that registers it")
    return Opener(catalog, LoadSettings(family="auto")).structure(source).config


def _import(package: str) -> str:
    """Import ``package`` and return its distribution. Raises `ModelError`."""
    try:
        importlib.import_module(package)
    except Exception as error:  # third-party code raises anything
        raise ModelError(f"--import {package}: {type(error).__name__}: {first_line(error)}") from error
    top = package.partition(".")[0]
    return min(metadata.packages_distributions().get(top, [top]))


def write_package(directory: Path, name: str, model: ModelFacts, *, kind: str = "family") -> None:
    """Write the plugin ``name`` to the new ``directory``. ``kind``: one of `PACKAGES`. Raises `OutputError`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from ..plugins.installed import KINDS

    distribution = distribution_of(name)
    module = distribution.replace("-", "_")
    environment = Environment(
        loader=PackageLoader("llmpruner.scaffold", "templates"), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    templates = {
        **{file: file for file in ("pyproject.toml", "README.md")},
        f"src/{module}/__init__.py": "init.py",
        f"src/{module}/{kind}.py": f"{kind}.py",
        f"tests/test_{kind}.py": "test_family.py" if kind == "family" else "test_component.py",
    }
    cls, adds = "".join(map(str.capitalize, (*name.split("-"), kind))), KINDS[PACKAGES[kind]]
    files = {
        path: environment.get_template(f"{template}.j2").render(
            name=name, distribution=distribution, module=module, model=model, version=__version__, kind=kind,
            adds=adds, cls=cls,
        )
        for path, template in templates.items()
    }  # fmt: skip
    if model.config_values:
        files["tests/config.json"] = json.dumps(model.config_values, indent=2, ensure_ascii=False) + "\n"
    with new_directory(directory) as partial:
        for path, text in files.items():
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            (partial / path).write_text(text, encoding="utf-8")
