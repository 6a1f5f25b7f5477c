"""A want of memory is told from a fault of a model, and is never taken for one."""

from __future__ import annotations

import pytest
import torch

from llmpruner import cli
from llmpruner.errors import is_out_of_memory
from llmpruner.models.save import gives_logits

LACK = RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried to …")


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (LACK, True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("could not create a descriptor for a memory object"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x64 and 48x64)"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_for_want_of_memory_are_known(error, lacks):
    assert is_out_of_memory(error) == lacks


def test_a_rebuilt_model_is_not_called_different_for_want_of_memory(gqa, monkeypatch):
    def raising(error):
        def forward(**_):
            raise error

        return forward

    monkeypatch.setattr(gqa.model, "forward", raising(LACK))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        gives_logits(torch.zeros(1), gqa.model)
    monkeypatch.setattr(gqa.model, "forward", raising(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
    assert not gives_logits(torch.zeros(1), gqa.model)


@pytest.mark.parametrize("error", [MemoryError(), LACK])
def test_a_command_that_lacks_memory_ends_with_one_line(error, monkeypatch, capsys):
    def build_app():
        raise error

    monkeypatch.setattr(cli.app, "build_app", build_app)
    monkeypatch.setattr("sys.argv", ["llmpruner", "plan", "demo"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and "out of memory (" in printed and "Traceback" not in printed
