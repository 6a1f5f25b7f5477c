"""Facts about a model for its plugin package: its type, a small configuration for tests, and where its code is."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import CONFIG_MAPPING

from ..discovery.family import ModelFamily
from ..discovery.oracle import VERIFIED
from ..discovery.structure import load_structure
from ..discovery.tiny import small_config
from ..discovery.verify import verify
from ..errors import ModelError, UnsupportedModelError, first_line
from ..models.messages import quiet_transformers
from ..settings import LoadSettings
from .package import ModelFacts, Parent

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..plugins.catalog import Catalog

_PROVENANCE = ("model_type", "transformers_version", "architectures", "auto_map", "_name_or_path", "dtype")
"""Values of a configuration about its origin, which constructors do not need."""
LLMPRUNER = "llmpruner"
"""The distribution that every plugin requires."""


def describe(source: str, catalog: Catalog, *, package: str | None = None) -> ModelFacts:
    """The facts of ``source``: a directory, a hub id, a ``.gguf`` file, or a model type that transformers knows, once
    ``package`` is imported.

    Raises `ModelError` when there is no such model, `UnsupportedModelError` when its structure cannot be discovered.
    """
    distribution = _import(package) if package else None
    with quiet_transformers():
        config = read_config(source, catalog)
        small = small_config(config)
        values = _arguments(small)
        relative = _relative(config, catalog)
        derived = relative is not None and _is_special(relative)
        facts = ModelFacts(
            types=(config.model_type,),
            config_class=type(config).__name__,
            config_module=_public_module(type(config)),
            config_values=values,
            extends=relative.name if relative else None,
            package=package,
            requires=distribution,
            parent=_parent(relative, config, values, catalog) if relative and derived else None,
        )
        return replace(facts, kinds=_proved(small, relative if derived else None))


def _proved(small: PreTrainedConfig, family: ModelFamily | None) -> tuple[str, ...]:
    """The kinds of units of ``family``; None: those that discovery finds. Raises `UnsupportedModelError` if the oracle
    does not verify them all, as the family's tests would fail."""
    verdicts = verify(family, small, shrink=False)
    for verdict in verdicts:
        if verdict.verdict != VERIFIED:
            raise UnsupportedModelError(
                f"cutting {verdict.kind} units of {small.model_type} is {verdict.verdict}: {verdict.reason}"
            )
    return tuple(verdict.kind for verdict in verdicts)


def read_config(source: str, catalog: Catalog) -> PreTrainedConfig:
    """The dense configuration of a model, or the default one of a model type."""
    catalog.register_models()
    if source in CONFIG_MAPPING and not Path(source).exists():
        default: PreTrainedConfig = CONFIG_MAPPING[source]()
        return default
    _refuse_unknown_code(Path(source))
    if not Path(source).exists() and source.isidentifier():
        raise ModelError(
            f"'{source}' is neither a model directory nor a model type that transformers knows; "
            "--import PACKAGE names the package that registers it"
        )
    return load_structure(source, catalog, LoadSettings(family="auto")).config


def _refuse_unknown_code(directory: Path) -> None:
    """Raise `ModelError` for a model type whose classes are not in an installed package, where a plugin can import
    them."""
    file = directory / "config.json"
    if not file.is_file():
        return
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        model_type = values.get("model_type")
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if model_type is not None and model_type not in CONFIG_MAPPING and not str(model_type).startswith("llmpruner"):
        raise ModelError(
            f"{file}: transformers does not know model type '{model_type}'; put its classes into a package that "
            "registers them with AutoConfig and AutoModelForCausalLM, install it, and name it with --import PACKAGE"
        )


def _import(package: str) -> str:
    """Import ``package``; returns the distribution it comes from. Raises `ModelError`."""
    try:
        importlib.import_module(package)
    except Exception as error:  # third-party code raises anything
        raise ModelError(f"--import {package}: {type(error).__name__}: {first_line(error)}") from error
    top = package.partition(".")[0]
    found = metadata.packages_distributions().get(top)
    if not found:
        raise ModelError(
            f"--import {package}: the package belongs to no installed distribution, so that a plugin cannot "
            "depend on it; give it a pyproject.toml and pip install it"
        )
    return sorted(set(found))[0]


def _relative(config: PreTrainedConfig, catalog: Catalog) -> ModelFamily | None:
    """The family that matches ``config`` already, which the new one must extend."""
    return catalog.family_for(config) if catalog.matching(config) else None


def _is_special(family: ModelFamily) -> bool:
    """Whether a family is for some models of a type, or has a chat format: a family of the type that extends it would
    take other models over, and lose the format."""
    own_models = type(family).matches is not ModelFamily.matches
    return family.extends is not None or family.has_own_format or own_models


def _parent(family: ModelFamily, config: PreTrainedConfig, values: Mapping[str, Any], catalog: Catalog) -> Parent:
    """What a family that derives from ``family`` needs. ``values``: of the small configuration.

    Raises `UnsupportedModelError` where the class cannot be imported from an installed package, or does not recognise
    the small model.
    """
    cls, distribution = type(family), catalog.families.package_of(family.name)
    module = _public_module(cls)
    importable = getattr(importlib.import_module(module), cls.__name__, None) is cls
    if not importable or module.partition(".")[0] not in catalog.manager.packages:
        raise UnsupportedModelError(
            f"these models have the family '{family.name}', which is in no installed package that a new one could "
            "require"
        )
    known_as = _known_as(family, config, values)
    if known_as is None:
        raise UnsupportedModelError(
            f"family '{family.name}' does not recognise a small model of this kind, which tests need; derive from "
            f"{cls.__name__} of {module} by hand"
        )
    return Parent(
        family.name,
        cls.__name__,
        module,
        requires=None if distribution == LLMPRUNER else distribution,
        known_as=known_as,
        plain=_plain(family, type(config), catalog),
    )


def _known_as(family: ModelFamily, config: PreTrainedConfig, values: Mapping[str, Any]) -> str | None:
    """A name or path with which ``family`` recognises the small configuration; None if there is none."""
    for name in ("", Path(str(config.name_or_path)).name, family.name):
        small = type(config)(**values)
        small.name_or_path = name
        if family.matches(small):
            return name
    return None


def _plain(family: ModelFamily, cls: type[PreTrainedConfig], catalog: Catalog) -> str | None:
    """The family of a default configuration of ``cls``; None where that is ``family``, or cannot be told."""
    try:
        found = catalog.family_for(cls())
    except Exception:  # third-party constructors raise anything
        return None
    return None if found.name == family.name else found.name


def _public_module(cls: type[Any]) -> str:
    """The shortest package path that exports ``cls`` under its name."""
    parts = cls.__module__.split(".")
    for length in range(1, len(parts)):
        module = ".".join(parts[:length])
        if getattr(importlib.import_module(module), cls.__name__, None) is cls:
            return module
    return cls.__module__


def _arguments(small: PreTrainedConfig) -> dict[str, Any]:
    """Arguments that build ``small``, as JSON values: those that differ from the defaults if they suffice, else all."""
    cls, every = type(small), _meaning(small)
    for leave_out in (_defaults(cls), {}):
        given = {n: v for n, v in sorted(every.items()) if n not in leave_out or leave_out[n] != v}
        try:
            rebuilt = cls(**given)
        except Exception:  # third-party constructors raise anything
            continue
        if _meaning(rebuilt) == every:
            return given
    raise UnsupportedModelError(f"a small {small.model_type} configuration cannot be rebuilt from its values")


def _defaults(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    try:
        return _meaning(cls())
    except Exception:  # a class whose arguments are required
        return {}


def _meaning(config: PreTrainedConfig) -> dict[str, Any]:
    """The values of a configuration as in its file, where tuples are lists and keys are strings."""
    values: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return {name: value for name, value in values.items() if name not in _PROVENANCE}
