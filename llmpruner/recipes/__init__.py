"""Recipes that are run by their names, and those that come with llmpruner."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from ..component import Component
from ..errors import PluginError, first_line

_SHIPPED = Path(__file__).with_name("shipped")


class NamedRecipe(Component):
    """A recipe file, for ``llmpruner run NAME``.

    ::

        class Twice(NamedRecipe):
            name = "twice"
            summary = "two rounds of pruning and training"
            path = Path(__file__).with_name("twice.yaml")
    """

    kind: ClassVar[str] = "recipe"
    hook: ClassVar[str] = "llmpruner_recipes"
    path: ClassVar[Path]
    """The YAML file. In it, ``${llmpruner}`` is the folder of llmpruner's package; other relative paths are relative to
    the folder in which the user's command runs."""

    def text(self) -> str:
        """The recipe, as YAML."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except OSError as error:  # packages leave files out that are not Python, unless told otherwise
            raise PluginError(f"{self.label()} has no file: {first_line(error)}") from error
        return text.replace("${llmpruner}", str(Path(__file__).parents[1]))


class PaperRecipe(NamedRecipe):
    name = "paper"
    summary = "LLM-Pruner: first-order Taylor, LoRA on Alpaca data, the paper's tasks and perplexity"
    path = _SHIPPED / "paper.yaml"


class QualityRecipe(NamedRecipe):
    name = "quality"
    summary = "the default method with uniform widths, then distillation from the dense model"
    path = _SHIPPED / "quality.yaml"


class ExpertsRecipe(NamedRecipe):
    name = "experts"
    summary = "a quarter of the experts of a mixture of experts removed, then LoRA"
    path = _SHIPPED / "experts.yaml"


class DemoRecipe(NamedRecipe):
    name = "demo"
    summary = "the steps of `llmpruner demo`: a real 135M model in minutes, offline"
    path = _SHIPPED / "demo.yaml"
