"""Facts about components, as ``llmpruner plugins`` shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.errors import PydanticUserError

from ..component import ComponentSettings
from ..errors import PluginError, UnknownNameError
from .catalog import Catalog

_TYPES = {"integer": "int", "number": "float", "string": "text", "boolean": "bool", "null": "none", "object": "mapping"}
_BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "multipleOf": "multiple of {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} values",
    "maxItems": "at most {} values",
    "pattern": "matches {}",
}


@dataclass(frozen=True)
class SettingFacts:
    """One setting of a component. ``type``: ``int``, ``float | none``, or the possible values: ``mean | max``.
    ``default``: a JSON value. ``bounds``: ``> 0, ≤ 1``; empty where there are none."""

    key: str
    type: str
    default: Any
    bounds: str
    description: str


@dataclass(frozen=True)
class ComponentFacts:
    """One component. ``package``: the distribution of its plugin. ``module``: of its class."""

    kind: str
    name: str
    package: str
    module: str
    summary: str
    settings: tuple[SettingFacts, ...]


def describe(catalog: Catalog, name: str) -> list[ComponentFacts]:
    """The components of that name, of every kind. Raises `UnknownNameError` when there is none, and
    `DuplicateNameError` when two of one kind have it."""
    registries = catalog.registries
    found = [
        ComponentFacts(
            registry.kind, name, registry.package_of(name), cls.__module__, summary_of(cls), settings_of(cls)
        )
        for registry in registries
        if name in registry
        for cls in [registry[name]]
    ]
    if not found:
        raise UnknownNameError("component", name, {known for registry in registries for known in registry})
    return found


def summary_of(cls: type[Any]) -> str:
    """A one-line description of a component: its own summary, else the first line of its docstring, else the summary of
    a base class."""
    text = vars(cls).get("summary") or cls.__doc__ or getattr(cls, "summary", "")
    return next(iter(str(text).strip().splitlines()), "").strip()


def settings_of(cls: type[Any]) -> tuple[SettingFacts, ...]:
    """The settings of a component, in order of definition. Raises `PluginError` for a type without JSON values."""
    model: type[ComponentSettings] = getattr(cls, "Settings", ComponentSettings)
    try:
        schema = model.model_json_schema(by_alias=False)
    except PydanticUserError as error:
        raise PluginError(f"the settings of {cls.__name__} have a type without JSON values: {error}") from error
    definitions = schema.get("$defs", {})
    defaults = model().model_dump(mode="json")
    return tuple(
        SettingFacts(key, _type(value, definitions), defaults[key], _bounds(value), value.get("description", ""))
        for key, value in schema.get("properties", {}).items()
    )


def _type(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return _type(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "enum" in schema or "const" in schema:
        return " | ".join(str(value) for value in schema.get("enum", [schema.get("const")]))
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(_type(part, definitions) for part in schema["anyOf"]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}), definitions)}"
    return _TYPES.get(schema.get("type", ""), "any")


def _bounds(schema: Mapping[str, Any]) -> str:
    """The bounds in ``schema`` and in the alternatives of a union, such as those of ``int`` in ``int | None``."""
    parts = [schema, *schema.get("anyOf", ())]
    return ", ".join(text.format(part[key]) for part in parts for key, text in _BOUNDS.items() if key in part)
