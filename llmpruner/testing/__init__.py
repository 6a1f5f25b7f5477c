"""What plugin authors test with: conformance classes for pytest, tiny models, and plugin hosts.

Subclass, say what is tested, and run pytest::

    from llmpruner.testing import CriterionConformance, FamilyConformance, RecoveryConformance

    class TestMyFamily(FamilyConformance):
        family = MyFamily

        def config(self):
            return MyConfig(num_hidden_layers=2, hidden_size=64, ...)

    class TestMyCriterion(CriterionConformance):
        criterion = MyCriterion

    class TestMyStrategy(RecoveryConformance):
        strategy = MyStrategy

Every failure names the parameter, unit, module or kind that disagrees. For tests of your own there are `tiny_llama` (a
model with every kind of unit), `letters` (a tokenizer that fits it), `settings_grid` (instances of a component that try
each value of its listed settings) and `host_with` (a plugin manager that holds given plugins); ``from
llmpruner.testing.fixtures import plugin_host`` gives the last as a pytest fixture.
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
