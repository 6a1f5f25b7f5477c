"""NamedRecipe: a recipe that is found by its name."""

from __future__ import annotations

from typing import ClassVar

from ...component import Component


class NamedRecipe(Component):
    """The text of a recipe file, for ``llmpruner run NAME``.

    ::

        class Twice(NamedRecipe):
            name = "twice"
            summary = "two rounds of pruning and training"

            def text(self):
                return "steps: [{rounds: 2, steps: [{prune: {ratio: 0.1}}, {recover: {data: alpaca.jsonl}}]}]"
    """

    kind: ClassVar[str] = "recipe"

    def text(self) -> str:
        """The recipe, as YAML. Relative paths in it are relative to the folder in which the user's command runs."""
        raise NotImplementedError
