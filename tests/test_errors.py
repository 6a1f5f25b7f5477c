"""Messages of exceptions; and a want of memory is told from a fault of a model, and is never taken for one."""

import pytest
import torch

from llmpruner.errors import SettingsError, is_out_of_memory
from llmpruner.models.save import gives_logits
from llmpruner.settings import PruneSettings, settings_from


@pytest.mark.parametrize(("name", "place"), [
    ("dtype", r"load=LoadSettings\(dtype=…\), or --dtype"),
    ("max_memory", r"run=RunSettings\(max_memory=…\), or --max-memory"),
])  # fmt: skip
def test_a_setting_of_loading_or_running_is_said_to_be_one(name, place):
    with pytest.raises(SettingsError, match=f"setting '{name}'; write {place}$"):
        settings_from(PruneSettings, {"ratio": 0.2, name: "4GiB"})


@pytest.mark.parametrize("layers", [-3, [0, -1], "5-3"])
def test_layers_that_no_model_has_are_refused(layers):
    with pytest.raises(SettingsError, match=r"prune\.layers .*: expected layer numbers such as 3-26"):
        settings_from(PruneSettings, {"ratio": 0.2, "layers": layers})


LACK = RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried to …")


@pytest.mark.parametrize(("error", "lacks"), [
    (MemoryError(), True),
    (torch.OutOfMemoryError("CUDA out of memory."), True),
    (LACK, True),
    (RuntimeError("MPS backend out of memory"), True),
    (RuntimeError("could not create a descriptor for a memory object"), False),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x64 and 48x64)"), False),
    (ValueError("out of memory"), False),
])  # fmt: skip
def test_errors_for_want_of_memory_are_known(error, lacks):
    assert is_out_of_memory(error) == lacks


def test_a_rebuilt_model_is_not_called_different_for_want_of_memory(gqa, monkeypatch):
    def raising(error):
        def forward(**_):
            raise error

        return forward

    monkeypatch.setattr(gqa.network, "forward", raising(LACK))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        gives_logits(torch.zeros(1), gqa.network)
    monkeypatch.setattr(gqa.network, "forward", raising(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
    assert not gives_logits(torch.zeros(1), gqa.network)
