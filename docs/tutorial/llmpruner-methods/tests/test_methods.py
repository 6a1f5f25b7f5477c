from llmpruner_methods import Consumers, RmsTaylor

from llmpruner.testing import CriterionConformance, RecoveryConformance


class TestRmsTaylor(CriterionConformance):
    criterion = RmsTaylor


class TestConsumers(RecoveryConformance):
    strategy = Consumers
