"""Training layers one by one."""

from __future__ import annotations

from llmpruner.recovery.local import LocalStrategy
from llmpruner.testing import RecoveryConformance


class TestConformance(RecoveryConformance):
    strategy = LocalStrategy
