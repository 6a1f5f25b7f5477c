"""Padding: the inverse of a cut. Units of zeros take the place of removed ones, and outputs stay the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..structure.coupling import EXPERT, CoupledGroup, CouplingGraph
from ..structure.kept import Kept, kept_indices
from ..structure.wider import all_survivors
from .empty import put_parameters
from .surgery import cut

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..structure.architecture import Follows


def pad(
    model: PreTrainedModel, wide: PreTrainedModel, graph: CouplingGraph, now: Kept, kept: Kept, family: Follows
) -> CouplingGraph:
    """Cut ``wide`` to ``kept`` in place and give it the weights of ``model``, with zeros where ``model`` has none;
    returns its coupling graph. Weights of equal shape are shared.

    ``wide``: without weights, with the layers of ``model``; ``graph``: its coupling graph. ``model``: what ``wide`` cut
    to ``now`` would be. ``now``, ``kept``: group name → units; ``kept`` includes the units of ``now``.

    The weights that consume a padded unit are zero, so that it contributes nothing, whatever its activation is. Raises
    `UnsupportedModelError` for units that zeros do not silence: experts, and units under a norm over all of them.
    """
    ours, theirs = all_survivors(graph, now), all_survivors(graph, kept)
    for group in graph.groups:
        if ours[group.name] != theirs[group.name]:
            _check(group)
    before, after = kept_indices(graph, now), kept_indices(graph, kept)
    padded = cut(wide, graph, kept, family)
    parameters: dict[str, nn.Parameter] = {}
    made: dict[int, nn.Parameter] = {}
    for name, parameter in wide.named_parameters(remove_duplicate=False):
        if id(parameter) not in made:
            tensor = _own(model, name).detach()
            for axis, size in enumerate(graph.shapes[name]):
                tensor = _widened(
                    tensor, name, axis, before.get((name, axis), range(size)), after.get((name, axis), range(size))
                )
            if tensor.shape != parameter.shape:
                raise UnsupportedModelError(
                    f"'{name}' has shape {tuple(tensor.shape)}, expected {tuple(parameter.shape)}"
                )
            made[id(parameter)] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        parameters[name] = made[id(parameter)]
    put_parameters(wide, parameters)
    _copy_buffers(model, wide)
    wide.generation_config = model.generation_config
    return padded


def _check(group: CoupledGroup) -> None:
    if group.kind == EXPERT:
        raise UnsupportedModelError(
            f"group '{group.name}' has fewer experts than those of other layers, and a router chooses among experts of "
            "zeros too; prune experts with --shape uniform"
        )
    if group.is_normalized:
        raise UnsupportedModelError(
            f"group '{group.name}' has a norm over all its units, whose result zeros would change; prune this "
            "kind with --shape uniform"
        )
    for span in group.cut_spans:
        owned = span.indices(range(group.units))
        if owned != sorted(owned):
            raise UnsupportedModelError(f"group '{group.name}': the units of {span.parameter} are not stored in order")


def _own(model: PreTrainedModel, name: str) -> nn.Parameter:
    try:
        found: nn.Parameter = model.get_parameter(name)
    except AttributeError:
        raise UnsupportedModelError(f"the model has no parameter '{name}', which one of full width has") from None
    return found


def _widened(tensor: torch.Tensor, name: str, axis: int, now: Sequence[int], kept: Sequence[int]) -> torch.Tensor:
    """``tensor`` with zeros along ``axis`` for the indices ``kept`` that are not in ``now``."""
    ours, wanted = list(now), list(kept)
    if tensor.shape[axis] != len(ours):
        raise UnsupportedModelError(
            f"'{name}' has {tensor.shape[axis]} entries along axis {axis}; its plans leave {len(ours)}"
        )
    if ours == wanted:
        return tensor
    position = {index: number for number, index in enumerate(wanted)}
    target = torch.tensor([position[index] for index in ours], device=tensor.device)
    shape = [*tensor.shape[:axis], len(wanted), *tensor.shape[axis + 1 :]]
    return tensor.new_zeros(shape).index_copy_(axis, target, tensor)


def _copy_buffers(model: PreTrainedModel, wide: PreTrainedModel) -> None:
    """Buffers that a checkpoint keeps have values of their own."""
    saved = model.state_dict(keep_vars=True).keys()
    for name, buffer in model.named_buffers():
        if name in saved:
            path, _, leaf = name.rpartition(".")
            wide.get_submodule(path)._buffers[leaf] = buffer
