"""What a training saves to fit into memory: first activations, then copies of the weights."""

import psutil
import pytest
from recovery_cases import model_of, pruned_model

from llmpruner import SettingsError, load_catalog
from llmpruner.discovery.opening import Opener
from llmpruner.models.devices import CPU
from llmpruner.recovery.data import RecoverySetup
from llmpruner.recovery.forecast import _chosen
from llmpruner.recovery.strategies import FullStrategy
from llmpruner.settings import RecoverSettings


@pytest.fixture
def chosen(monkeypatch):
    """The forecast for a machine with some bytes free, and ``total`` bytes, in one process or two."""
    monkeypatch.setattr("llmpruner.recovery.forecast.MODULES", 0)
    opened = model_of(*pruned_model())

    def choose(free, processes, total=1 << 40, kept=None, **settings):
        memory = psutil.virtual_memory()._replace(available=free, total=total)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        setup = RecoverySetup(RecoverSettings(data="self", **settings), FullStrategy())
        return _chosen(setup, opened, None, Opener(load_catalog()), CPU, kept, processes)

    return choose


def saved(forecast):
    return forecast.shards, forecast.recomputes


def test_activations_are_computed_again_where_they_do_not_fit(chosen):
    whole = chosen(1 << 40, 1)
    assert saved(whole) == (1, False) and whole.held == 16 * sum(p.numel() for p in pruned_model()[0].parameters())
    again = chosen(whole.memory - 1, 1)
    assert saved(again) == (1, True) and again.memory < whole.memory
    assert "computed again" in str(again)
    assert saved(chosen(again.memory // 2, 1)) == (1, True), "it may run; the machine has enough"


def test_weights_are_sharded_where_copies_do_not_fit(chosen):
    again = chosen(0, 1)
    assert saved(chosen(2 * again.memory, 2)) == (1, True), "a copy each"
    assert saved(chosen(2 * again.memory - 1, 2))[0] == 2
    assert saved(chosen(1 << 40, 2, sharded=True)) == (2, False)
    assert saved(chosen(1 << 40, 2, kept=True)) == (2, False), "a training that goes on"
    assert saved(chosen(0, 2, sharded=False)) == (1, True)


def test_what_the_machine_does_not_have_is_refused_but_shards_need_a_part(chosen):
    held = chosen(0, 1).held
    with pytest.raises(SettingsError, match=r"full needs .*; --strategy lora"):
        chosen(0, 1, total=held - 1)
    assert saved(chosen(0, 2, total=held)) == (2, True)


def test_no_more_rows_are_counted_than_a_batch_has(chosen):
    of_two = chosen(1 << 40, 1, micro_batch_size=2).memory
    assert chosen(1 << 40, 1).memory > of_two
    assert chosen(1 << 40, 1, minutes=5).memory == of_two == chosen(1 << 40, 1, batch_size=2).memory
