"""The recipes that come with llmpruner. Their texts are in ``llmpruner/recipes/shipped``."""

from __future__ import annotations

from pathlib import Path

from .recipe import NamedRecipe

_PACKAGE = Path(__file__).parents[2]


class Shipped(NamedRecipe):
    """The file of its name, in which ``${llmpruner}`` is the folder of the package."""

    def text(self) -> str:
        return self.file().replace("${llmpruner}", str(_PACKAGE))

    @classmethod
    def file(cls) -> str:
        """The text as it is in the file."""
        return (_PACKAGE / "recipes" / "shipped" / f"{cls.name}.yaml").read_text(encoding="utf-8")


class PaperRecipe(Shipped):
    """Selection, training and evaluation as in LLM-Pruner (Ma, Fang, Wang, NeurIPS 2023, section 4.1)."""

    name = "paper"
    summary = "LLM-Pruner: first-order Taylor, LoRA on Alpaca data, the paper's tasks and perplexity"


class QualityRecipe(Shipped):
    """The default method, then distillation."""

    name = "quality"
    summary = "the default method with uniform widths, then distillation from the dense model"


class ExpertsRecipe(Shipped):
    """For mixtures of experts."""

    name = "experts"
    summary = "a quarter of the experts of a mixture of experts removed, then LoRA"


class DemoRecipe(Shipped):
    """The steps of ``llmpruner demo``."""

    name = "demo"
    summary = "the steps of `llmpruner demo`: a real 135M model in minutes, offline"
