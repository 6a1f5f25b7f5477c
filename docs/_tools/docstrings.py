"""Docstrings and signatures as Markdown, with those of attributes, which Python does not keep."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Collection, Iterator
from functools import cached_property
from typing import Any

_CODE = re.compile(r"``(.+?)``|`(.+?)`", re.S)


def markdown(text: str) -> str:
    """A docstring's text: double backquotes become single ones, ``::`` a fenced block, underscores stay as they are."""
    blocks: list[str] = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if block.startswith("    ") and blocks and blocks[-1].startswith("    "):
            blocks[-1] += f"\n\n{block}"
        elif block.startswith("    "):
            blocks.append(block)
        else:
            # A line that begins a list item stays a line of its own.
            parts = re.split(r"\n(?=- )", block)
            joined = [" ".join(line.strip() for line in part.splitlines()) for part in parts]
            lists = len(joined) > 1 and not joined[0].startswith("- ")
            text = joined[0] + "\n\n" * lists + "\n".join(joined[1:]) if lists else "\n".join(joined)
            # A bare ``::`` only announces the block after it.
            blocks += [_escaped(re.sub(r"::$", ":", text))] if text != "::" else []
    return "\n\n".join(_fenced(block) if block.startswith("    ") else block for block in blocks)


def _fenced(block: str) -> str:
    return f"```python\n{textwrap.dedent(block)}\n```"


def _escaped(text: str) -> str:
    parts, end = [], 0
    for code in _CODE.finditer(text):
        parts += [_plain(text[end : code.start()]), f"`{code[1] or code[2]}`"]
        end = code.end()
    return "".join([*parts, _plain(text[end:])])


def _plain(text: str) -> str:
    return re.sub(r"([_<])", r"\\\1", text)


def document(thing: Any) -> str:
    """The docstring of ``thing`` alone, not that of a base class; empty when it has none. Without the rule for the code
    of a module, which is for those who change it."""
    return inspect.cleandoc(thing.__doc__ or "").replace("Imports no torch.", "").strip()


def attributes(cls: type) -> dict[str, tuple[str, str]]:
    """Public attributes that a class declares, in order: name → (declaration, docstring). Without those that a base
    class documents (``kind``, ``settings``)."""
    inherited = {name for base in cls.__mro__[1:] if base.__module__ != "builtins" for name in _documented(base)}
    return {name: told for name, told in _declared(cls).items() if name not in inherited or told[1]}


def _documented(cls: type) -> Iterator[str]:
    try:
        declared = _declared(cls)
    except (OSError, TypeError):  # a class without source
        return
    yield from (name for name, (_, text) in declared.items() if text)


def _declared(cls: type) -> dict[str, tuple[str, str]]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, tuple[str, str]] = {}
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_":
            name = node.target.id
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and issubclass(cls, str):
            name = node.targets[0].id
        else:
            continue
        text = after.value.value if _is_text(after) else ""
        found[name] = (ast.unparse(node), inspect.cleandoc(str(text)))
    return found


def _is_text(node: ast.stmt | None) -> Any:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def methods(cls: type) -> dict[str, Any]:
    """Public methods and properties that the class itself defines, in order."""
    kinds = (property, cached_property, classmethod, staticmethod)
    return {
        name: member
        for name, member in vars(cls).items()
        if not name.startswith(("_", "model_")) and (inspect.isfunction(member) or isinstance(member, kinds))
    }


def is_property(member: Any) -> bool:
    return isinstance(member, property | cached_property)


def function_of(member: Any) -> Any:
    """The function that a method or property is made of."""
    if isinstance(member, property):
        return member.fget
    if isinstance(member, cached_property):
        return member.func
    return getattr(member, "__func__", member)


def signature_of(member: Any, name: str, brief: Collection[str] = ()) -> str:
    """How a function reads in code: one line, or one per parameter where that is too long. ``brief``: parameters that
    are named alone, as ``**`` ones are."""
    signature = inspect.signature(function_of(member))
    decorator = f"@{type(member).__name__}\n" if isinstance(member, classmethod | staticmethod) else ""
    inside: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not any(text.startswith("*") for text in inside):
            inside.append("*")
        if parameter.kind is parameter.VAR_KEYWORD:
            inside.append(f"**{parameter.name}")
        else:
            inside.append(f"{parameter.name}=…" if parameter.name in brief else _unquoted(parameter))
    returned = "" if signature.return_annotation is signature.empty else f" -> {signature.return_annotation}"
    line = f"def {name}({', '.join(inside)}){returned}"
    if len(line) > 88:
        lines = "".join(f"    {text},\n" for text in inside)
        line = f"def {name}(\n{lines}){returned}"
    return decorator + line


def class_section(cls: type) -> Iterator[str]:
    """A class with its docstring, attributes, properties and methods."""
    yield from ("", f"### {cls.__name__}", "", markdown(document(cls)), "")
    members = methods(cls)
    properties = {name: function_of(member) for name, member in members.items() if is_property(member)}
    values = [
        *attributes(cls).values(),
        *((f"{name}: {inspect.signature(f).return_annotation}", document(f)) for name, f in properties.items()),
    ]
    for declaration, text in values:
        yield f"- `{declaration}`" + (f": {' '.join(markdown(text).split())}" if text else "")
    for name, member in members.items():
        if name not in properties:
            yield from ("", f"#### {cls.__name__}.{name}", "", *function_lines(member, name))


def function_lines(member: Any, name: str) -> list[str]:
    """A function or method: its signature in a block, then its docstring."""
    text = re.sub(r"^(Returns|Called|Errors):", r"*\1:*", markdown(document(function_of(member))), flags=re.M)
    return ["```python", signature_of(member, name), "```", *(["", text] if text else [])]


def _unquoted(thing: Any) -> str:
    """Without the quotes of annotations that a module postpones."""
    return re.sub(r"(: |-> )'([^']+)'", r"\1\2", str(thing))
