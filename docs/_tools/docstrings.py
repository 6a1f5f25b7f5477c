"""Docstrings as Markdown, and what Python itself forgets: the docstrings of attributes."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
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
            joined = " ".join(line.strip() for line in block.splitlines())
            blocks.append(_escaped(re.sub(r"::$", ":", joined)))
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
    """The docstring of ``thing`` alone, not that of a base class; empty when it has none."""
    return inspect.cleandoc(thing.__doc__ or "")


def attributes(cls: type) -> dict[str, tuple[str, str]]:
    """Public attributes of a class, in order: name → (declaration, docstring)."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, tuple[str, str]] = {}
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_":
            text = after.value.value if _is_text(after) else ""
            found[node.target.id] = (ast.unparse(node), inspect.cleandoc(str(text)))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and issubclass(cls, str):
            text = after.value.value if _is_text(after) else ""
            found[node.targets[0].id] = (ast.unparse(node), inspect.cleandoc(str(text)))
    return found


def _is_text(node: ast.stmt | None) -> Any:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def methods(cls: type) -> dict[str, Any]:
    """Public methods and properties that the class itself defines, in order."""
    return {
        name: member
        for name, member in vars(cls).items()
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
    }


def signature_of(member: Any, name: str) -> str:
    """How a function or a property reads in code: one line, or one per parameter where that is too long."""
    if isinstance(member, property):
        returns = inspect.signature(member.fget).return_annotation
        return f"{name}: {returns}  # property"
    signature = inspect.signature(member)
    line = f"def {name}{_unquoted(signature)}"
    if len(line) <= 100:
        return line
    inside = "".join(f"    {_unquoted(p)},\n" for p in signature.parameters.values())
    return f"def {name}(\n{inside}) -> {signature.return_annotation}"


def _unquoted(thing: Any) -> str:
    """Annotations are text in modules that postpone them; their quotes would say nothing."""
    return re.sub(r"(: |-> )'([^']+)'", r"\1\2", str(thing))
