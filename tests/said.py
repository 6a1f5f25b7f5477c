"""A `Progress` that keeps its messages."""

from __future__ import annotations

from llmpruner.progress import Progress


class Said(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def status(self, label: str) -> None:
        self.lines.append(label)
