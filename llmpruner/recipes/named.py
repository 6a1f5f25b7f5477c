"""NamedRecipe: a recipe that is found by its name; and those that come with llmpruner, from ``recipes/shipped``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from ..component import Component


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


_PACKAGE = Path(__file__).parents[1]


class Shipped(NamedRecipe):
    """The file of its name, in which ``${llmpruner}`` is the folder of the package."""

    def text(self) -> str:
        return self.file().replace("${llmpruner}", str(_PACKAGE))

    @classmethod
    def file(cls) -> str:
        """The text as it is in the file."""
        return (_PACKAGE / "recipes" / "shipped" / f"{cls.name}.yaml").read_text(encoding="utf-8")


class PaperRecipe(Shipped):
    name = "paper"
    summary = "LLM-Pruner: first-order Taylor, LoRA on Alpaca data, the paper's tasks and perplexity"


class QualityRecipe(Shipped):
    name = "quality"
    summary = "the default method with uniform widths, then distillation from the dense model"


class ExpertsRecipe(Shipped):
    name = "experts"
    summary = "a quarter of the experts of a mixture of experts removed, then LoRA"


class DemoRecipe(Shipped):
    name = "demo"
    summary = "the steps of `llmpruner demo`: a real 135M model in minutes, offline"
