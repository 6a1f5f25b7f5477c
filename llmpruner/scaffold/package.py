"""A plugin package: facts about its model, rendering and writing. Imports torch when a model is described."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import LlmprunerError, ModelError, UnsupportedModelError, first_line
from ..files import new_directory
from ..settings import LoadSettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..plugins.catalog import Catalog

FILES = {
    "pyproject.toml": "pyproject.toml.j2",
    "README.md": "README.md.j2",
    "src/{module}/__init__.py": "init.py.j2",
    "src/{module}/{kind}.py": "{kind}.py.j2",
    "tests/test_{kind}.py": "test_{kind}.py.j2",
}
"""Path in the package → template, both with placeholders for the names of the module and of the kind."""

KINDS = {"family": "family", "criterion": "criterion", "strategy": "recovery strategy"}
"""What a package can add → the kind of component, as the catalog names it."""

PREFIX = "llmpruner-"
_PROVENANCE = ("model_type", "transformers_version", "architectures", "auto_map", "_name_or_path", "dtype")
"""Values of a configuration about its origin, which constructors do not need."""
_NAME = re.compile(rf"(?!{PREFIX})[a-z][a-z0-9]*(-[a-z0-9]+)*")


def distribution_of(name: str) -> str:
    """``llmpruner-odd`` for the plugin ``odd``. Raises `LlmprunerError` for a word that cannot name a plugin."""
    if not _NAME.fullmatch(name):
        raise LlmprunerError(
            f"'{name}' cannot name a plugin; expected lower case letters, digits and single dashes, a letter first, as "
            f"in 'my-model'; '{PREFIX}' is added"
        )
    return PREFIX + name


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


def describe(source: str, catalog: Catalog, *, package: str | None = None) -> ModelFacts:
    """The facts of ``source``: a directory, a hub id, a ``.gguf`` file, or a model type that transformers knows, once
    ``package`` is imported. Raises `ModelError`, and `UnsupportedModelError` when a family matches it already, or its
    structure is not proved."""
    from ..discovery.family import AUTO
    from ..discovery.oracle import VERIFIED
    from ..discovery.verify import check_kinds, representative
    from ..models.messages import quiet_transformers

    distribution = _import(package) if package else None
    with quiet_transformers():
        config = read_config(source, catalog)
        family = catalog.family_for(config)
        if family.name != AUTO:
            cls = type(family)
            raise UnsupportedModelError(
                f"these models have the family '{cls.name}' already; leave --from out, and derive your family from "
                f"{cls.__name__} of {cls.__module__}"
            )
        small, groups = representative(config, family)
        values = {n: value for n, value in json.loads(small.to_json_string()).items() if n not in _PROVENANCE}
        verdicts = check_kinds(family, small, groups)
        for verdict in verdicts:
            if verdict.verdict != VERIFIED:
                raise UnsupportedModelError(
                    f"cutting {verdict.kind} units of {small.model_type} is {verdict.verdict}: {verdict.reason}"
                )
        return ModelFacts(
            model_type=config.model_type,
            config_class=type(config).__name__,
            config_module=type(config).__module__,
            config_values=values,
            package=package,
            requires=distribution,
            kinds=tuple(verdict.kind for verdict in verdicts),
        )


def read_config(source: str, catalog: Catalog) -> PreTrainedConfig:
    """The dense configuration of a model, or the default one of a model type."""
    from transformers import CONFIG_MAPPING

    from ..discovery.opening import load_structure

    catalog.register_models()
    if source in CONFIG_MAPPING and not Path(source).exists():
        default: PreTrainedConfig = CONFIG_MAPPING[source]()
        return default
    if not Path(source).exists() and source.isidentifier():
        raise ModelError(
            f"'{source}' is neither a model directory nor a model type that transformers knows; "
            "--import PACKAGE names the package that registers it"
        )
    return load_structure(source, catalog, LoadSettings(family="auto")).config


def _import(package: str) -> str:
    """Import ``package``; returns its distribution. Raises `ModelError`."""
    try:
        importlib.import_module(package)
    except Exception as error:  # third-party code raises anything
        raise ModelError(f"--import {package}: {type(error).__name__}: {first_line(error)}") from error
    top = package.partition(".")[0]
    return min(metadata.packages_distributions().get(top, [top]))


def render(name: str, model: ModelFacts | None = None, *, kind: str = "family") -> dict[str, str]:
    """Path in the package → text. ``kind``: one of `KINDS`. ``model``: of a family."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from ..plugins import catalog

    distribution = distribution_of(name)
    module = distribution.replace("-", "_")
    model = model or ModelFacts()
    environment = Environment(
        loader=PackageLoader("llmpruner.scaffold", "templates"), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    values = {
        "name": name,
        "distribution": distribution,
        "module": module,
        "model": model,
        "version": __version__,
        "kind": kind,
        "adds": catalog.KINDS[KINDS[kind]],
        "cls": "".join(part.capitalize() for part in (*name.split("-"), kind)),
    }
    files = {
        path.format(module=module, kind=kind): environment.get_template(template.format(kind=kind)).render(values)
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
