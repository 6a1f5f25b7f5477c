"""Facts about a model for its plugin package: its type, a small configuration for tests, and where its code is."""

from __future__ import annotations

import importlib
import json
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import CONFIG_MAPPING

from ..discovery.opening import load_structure
from ..discovery.oracle import VERIFIED
from ..discovery.tiny import small_config
from ..discovery.verify import verify
from ..errors import ModelError, UnsupportedModelError, first_line
from ..models.messages import quiet_transformers
from ..settings import LoadSettings
from .package import ModelFacts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..plugins.catalog import Catalog

_PROVENANCE = ("model_type", "transformers_version", "architectures", "auto_map", "_name_or_path", "dtype")
"""Values of a configuration about its origin, which constructors do not need."""


def describe(source: str, catalog: Catalog, *, package: str | None = None) -> ModelFacts:
    """The facts of ``source``: a directory, a hub id, a ``.gguf`` file, or a model type that transformers knows, once
    ``package`` is imported. Raises `ModelError`, and `UnsupportedModelError` when a family matches it already, or its
    structure is not proved."""
    distribution = _import(package) if package else None
    with quiet_transformers():
        config = read_config(source, catalog)
        if catalog.matching(config):
            cls = type(catalog.family_for(config))
            raise UnsupportedModelError(
                f"these models have the family '{cls.name}' already; leave --from out, and derive your family from "
                f"{cls.__name__} of {cls.__module__}"
            )
        small = small_config(config)
        values = {n: value for n, value in json.loads(small.to_json_string()).items() if n not in _PROVENANCE}
        verdicts = verify(None, small, shrink=False)
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
