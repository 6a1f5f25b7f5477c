"""The walk of docs/design.md, from ``llmpruner prune`` to the saved directory: the functions that the command, the
Python API and the pipeline call once, in their order. What happens inside others is the topic of their file.

    python tools/walk.py MODEL [OPTION …]      such as: demo --ratio 0.2 --method fast --samples 8
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

OWN = str(Path(__file__).resolve().parents[1] / "llmpruner") + os.sep
STORY = ("__main__.py", "cli/", "api.py", "pipeline.py")
"""Files whose functions the walk goes into."""
WRAPPERS = {("cli/derive.py", "run"), ("cli/process.py", "run"), ("engine/ranks.py", "from_first")}
"""Functions that only call what they are given."""
INSIDE = 100
"""Calls inside llmpruner that a function makes at least, directly and indirectly, to be in the walk."""


class Call:
    """All calls of one function by one caller."""

    def __init__(self, code: CodeType | None) -> None:
        self.code, self.count = code, 0
        self.inside: dict[CodeType, Call] = {}

    def size(self) -> int:
        return sum(call.count + call.size() for call in self.inside.values())


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        calls = list(walk(traced(["prune", *sys.argv[1:], "-o", str(Path(work) / "pruned")])))
    # The report is written after `save`.
    calls = calls[: 1 + next(n for n, (_, name, _) in enumerate(calls) if name == "save")]
    for depth, name, file in calls:
        print(f"{'  ' * depth}{name}  ({file})")
    print(f"{len(calls)} functions in {len({file for _, _, file in calls})} files")


def traced(words: list[str]) -> Call:
    """The calls of ``llmpruner WORDS`` from its command on."""
    from llmpruner.cli import main as llmpruner

    root = Call(None)
    stack = [root]

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(OWN):
            return
        if code.co_name in ("<module>", "<lambda>") or (code.co_filename.removeprefix(OWN), code.co_name) in WRAPPERS:
            return
        if event == "call":
            stack.append(stack[-1].inside.setdefault(code, Call(code)))
            stack[-1].count += 1
        elif stack[-1].code is code:
            stack.pop()

    sys.argv = ["llmpruner", *words]
    sys.setprofile(profile)
    with suppress(SystemExit):
        llmpruner()
    sys.setprofile(None)
    return root


def walk(call: Call, depth: int = 0) -> Iterator[tuple[int, str, str]]:
    """(depth, function, file)."""
    for code, inner in call.inside.items():
        file = code.co_filename.removeprefix(OWN)
        if code.co_name.isidentifier() and inner.count == 1 and inner.size() >= INSIDE:
            yield depth, code.co_name, file
            yield from walk(inner, depth + 1) if file.startswith(STORY) else ()


if __name__ == "__main__":
    main()
