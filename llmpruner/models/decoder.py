"""The coupling graph of a model, and the path of its decoder layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import UnsupportedModelError
from ..structure.coupling import CoupledGroup, CouplingGraph

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def graph_of(model: PreTrainedModel, groups: Callable[[], Sequence[CoupledGroup]]) -> CouplingGraph:
    """The coupling graph of ``groups()`` and the shapes of ``model``. Raises `CouplingError` where they contradict."""
    names: dict[int, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    ties: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shapes[name] = tuple(parameter.shape)
        first = names.setdefault(id(parameter), name)
        if first != name:
            ties[name] = first
    buffers = {name: tuple(buffer.shape) for name, buffer in model.named_buffers(remove_duplicate=False)}
    return CouplingGraph(tuple(groups()), shapes, decoder_layers(model), ties, buffers=buffers)


def decoder_layers(model: Any) -> str:
    """Path of the module list of the decoder layers: of as many modules as the configuration has layers, else the
    longest. Raises `UnsupportedModelError` when there is none.
    """
    # In a multimodal model, only inside the language model.
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = next((n for n, m in model.named_modules() if m is decoder), "")
    found = [(len(m), -n.count("."), n) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    # Some classes call their head the decoder.
    lists = [entry for entry in found if entry[2].startswith(inside)] or found
    with_parameters = [entry for entry in lists if any(True for _ in model.get_submodule(entry[2]).parameters())]
    expected = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    exact = [entry for entry in with_parameters if entry[0] == expected]
    if not with_parameters:
        raise UnsupportedModelError(f"{type(model).__name__} has no list of decoder layers")
    path: str = max(exact or with_parameters)[2]
    return path


def decoder_list(model: PreTrainedModel, path: str) -> nn.ModuleList:
    """The module at ``path``. Raises `UnsupportedModelError` unless it is a list of layers."""
    modules = model.get_submodule(path)
    if not isinstance(modules, nn.ModuleList):
        raise UnsupportedModelError(f"'{path}' of {type(model).__name__} is not a list of layers")
    return modules
