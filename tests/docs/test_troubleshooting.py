"""Messages that the page on troubleshooting quotes are messages that the code raises."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = [message.strip() for message in re.findall(r"```text\n(.*?)```", PAGE, re.S)]


def texts() -> str:
    """Every string of the sources; what an f-string fills in becomes ``…``."""
    found = []
    for file in sorted((ROOT / "llmpruner").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


TEXTS = texts()


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_raised_somewhere(message):
    fragments = [part.strip(" ;:'(),") for part in message.split("…")]
    missing = [part for part in fragments if part and part not in TEXTS]
    assert not missing, f"docs/troubleshooting.md quotes what no source contains: {missing}"


def test_the_page_quotes_messages():
    assert len(MESSAGES) > 15 and all(len(message.replace("…", "")) > 12 for message in MESSAGES)
