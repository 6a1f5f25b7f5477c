"""Test tools for plugin authors: conformance classes for pytest, tiny models, and plugin hosts.

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

Failures name the parameter, unit, module or kind. For your own tests, use `tiny_llama` (a model with every kind of
unit), `letters` (a tokenizer for it), `settings_grid` (instances of a component with each value of its settings of type
Literal or bool) and `host_with` (a plugin host with given plugins); ``from llmpruner.testing.fixtures import
plugin_host`` imports the last as a pytest fixture.
"""

from __future__ import annotations

from .criterion import CriterionConformance
from .family import FamilyConformance
from .grid import settings_grid
from .hosts import host_with
from .probe import run_probe
from .recovery import RecoveryConformance
from .tiny import letters, tiny_llama

__all__ = [
    "CriterionConformance",
    "FamilyConformance",
    "RecoveryConformance",
    "host_with",
    "letters",
    "run_probe",
    "settings_grid",
    "tiny_llama",
]
