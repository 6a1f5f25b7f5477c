"""Test tools for plugin authors: conformance classes for pytest, tiny models, and catalogs.

Subclass the conformance classes, and run pytest::

    from llmpruner.testing import CriterionConformance, FamilyConformance, RecoveryConformance

    class TestMyFamily(FamilyConformance):
        family = MyFamily

        def config(self):
            return MyConfig(num_hidden_layers=2, hidden_size=64, ...)

    class TestMyCriterion(CriterionConformance):
        criterion = MyCriterion

    class TestMyStrategy(RecoveryConformance):
        strategy = MyStrategy

For your own tests, there are `tiny_llama` (a model with every kind of unit), `letters` (its tokenizer), `settings_grid`
(instances of a component with each choice of its settings) and `catalog_with` (a catalog with your plugins).
"""

from __future__ import annotations

from .components import catalog_with as catalog_with
from .components import settings_grid as settings_grid
from .criterion import CriterionConformance as CriterionConformance
from .family import FamilyConformance as FamilyConformance
from .models import letters as letters
from .models import tiny_llama as tiny_llama
from .recovery import RecoveryConformance as RecoveryConformance
