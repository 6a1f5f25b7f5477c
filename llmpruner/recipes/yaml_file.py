"""Reading YAML with the line of every value, so that a message can name the place of a mistake."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from ..errors import SettingsError, first_line

Path = tuple[str | int, ...]
Lines = Mapping[Path, int]
"""Keys and positions from the top of the document → the line, counted from 1, where the key or the element stands."""

_MAP, _LIST = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"
_TAG = "tag:yaml.org,2002:"
_PLAIN = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
"""Types of YAML 1.2 → how values are written, and their first characters."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Booleans and numbers as in YAML 1.2: ``on``, ``off``, ``yes`` and ``no`` are words, ``2e-4`` is a number, and
    ``1:2`` is none."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag.removeprefix(_TAG) not in _PLAIN]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), list(_first))


def scalar(text: str) -> Any:
    """The value of one piece of YAML. Raises `yaml.YAMLError`, and `ValueError` for what cannot be read."""
    return yaml.load(text, Loader=_Loader)


def read_yaml(text: str, source: str) -> tuple[Any, Lines]:
    """The value of one YAML document, with plain types only (as `yaml.safe_load`), and the lines of its parts.

    ``source``: the file, for messages. Raises `SettingsError` with the line: for text that is no YAML, for a key that
    is given twice in one mapping, and for tags of other types.
    """
    lines: dict[Path, int] = {}
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return (None if node is None else _value(loader, node, (), (), lines, source)), lines
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = source if mark is None else f"{source}, line {mark.line + 1}"
        raise SettingsError(
            f"{place}: not valid YAML: {getattr(error, 'problem', None) or first_line(error)}"
        ) from error


def _value(
    loader: yaml.SafeLoader,
    node: yaml.Node,
    path: Path,
    inside: tuple[yaml.Node, ...],
    lines: dict[Path, int],
    source: str,
) -> Any:
    """``inside``: the collections that ``node`` is in."""
    place = f"{source}, line {node.start_mark.line + 1}"
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.ScalarNode):
        try:
            return loader.construct_object(node)
        except ValueError as error:  # such as a day that no calendar has
            raise SettingsError(f"{place}: '{node.value}' cannot be read: {first_line(error)}") from error
    if node in inside:
        raise SettingsError(f"{place}: a value contains itself")
    if node.tag not in (_MAP, _LIST):
        raise SettingsError(f"{place}: a tag '{node.tag}' is not used here; leave it out")
    within = (*inside, node)
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, one, (*path, n), within, lines, source) for n, one in enumerate(node.value)]
    found: dict[str, Any] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise SettingsError(f"{source}, line {line}: expected a name before the colon")
        here = (*path, key.value)
        if key.value in found:
            raise SettingsError(
                f"{source}, line {line}: '{key.value}' is given twice, in line {lines[here]} too; keep one"
            )
        lines[here] = line
        found[key.value] = _value(loader, value, here, within, lines, source)
    return found
