"""A model of transformers without weights, which are read from files part by part.

A part is one decoder layer, or everything outside the layers. What reads the tensors of a format is a `TensorSource`;
that of safetensors files is here. Loading them is transformers' own, with everything on disk: tensors that are in a
file as the model has them stay there, and others (experts one by one, fused projections) are converted one by one into
a folder. The hooks by which accelerate then reads the weights of single modules are replaced by reading whole parts,
whose weights a stage can look at and change.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

from ..errors import CheckpointError, LlmprunerError, first_line
from ..folders import scratch_folder
from ..structure.coupling import layer_number
from .empty import put_parameters
from .load import model_class
from .mapped import pages_given_back
from .quiet import quiet_transformers

if TYPE_CHECKING:
    import tempfile

    from transformers import PreTrainedModel

    from .source import TensorSource


class LazyModel:
    """``model``: with parameters on the meta device, and buffers with their values. ``source``: of its weights.
    ``layers``: path of the decoder layers. ``info``: as the loading info of ``from_pretrained``; None where the
    names and shapes of the tensors are checked already."""

    reads_ahead = True

    def __init__(
        self, model: PreTrainedModel, source: TensorSource, layers: str, info: Mapping[str, Any] | None = None
    ) -> None:
        self.model = model.eval()
        self.info = info
        self._source, self._one_call = source, Lock()
        self._tied = set(dict(model.named_parameters(remove_duplicate=False))) - set(dict(model.named_parameters()))
        self._parts: dict[int | None, dict[str, nn.Parameter]] = {}
        """Part → its parameters on the meta device; tied ones are under each of their names."""
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._parts.setdefault(layer_number(name, layers), {})[name] = parameter

    def read(self, part: int | None) -> dict[str, torch.Tensor]:
        """Parameter → value, on the CPU; see `TensorSource.read`. It may be called in another thread. Raises
        `CheckpointError`, and `OutputError` where values are kept in files that cannot be written."""
        names = [name for name in self._parts[part] if name not in self._tied]
        try:
            with self._one_call:
                return self._source.read(names)
        except LlmprunerError:
            raise
        except Exception as error:  # safetensors, torch and the system raise what they like
            raise CheckpointError(f"the weights of a layer cannot be read: {first_line(error)}") from error

    def fill(self, part: int | None, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give the parameters of ``part`` the values of `read`."""
        put_parameters(self.model, {n: nn.Parameter(t, requires_grad=False) for n, t in tensors.items()})
        if part is None:
            self.model.tie_weights()

    def empty(self, part: int | None) -> None:
        """Free the parameters of ``part``: put them back on the meta device."""
        put_parameters(self.model, self._parts[part])


def lazy_checkpoint(
    directory: Path, dtype: torch.dtype, layers: str, beside: Path | None = None, *, trust_remote_code: bool = False
) -> LazyModel:
    """The model in the safetensors files of ``directory``. ``layers``: path of the decoder layers. Converted tensors
    are in a temporary folder in ``beside`` (None: where the system has such folders), which is removed with the
    model."""
    folder = scratch_folder(".llmpruner-converted-", beside)
    # Converting reads all tensors that it converts.
    with quiet_transformers(), pages_given_back(directory, Path(folder.name)):
        model, info = model_class(directory, trust_remote_code).from_pretrained(
            str(directory),
            dtype=dtype,
            device_map={"": "disk"},
            offload_folder=folder.name,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
        )
    stored = _stored(model)
    source = _OffloadedTensors(stored, folder)
    remove_hook_from_submodules(model)
    vars(model).pop("hf_device_map", None)
    _tie(directory, model, stored)
    return LazyModel(model, source, layers, info)


def _tie(directory: Path, model: PreTrainedModel, stored: Mapping[str, torch.Tensor]) -> None:
    """Tie what the configuration ties and the files hold twice: transformers leaves two parameters where it has no
    values to compare. Raises `CheckpointError` where the values differ."""
    before = dict(model.named_parameters(remove_duplicate=False))
    model.tie_weights()
    after = dict(model.named_parameters(remove_duplicate=False))
    kept = {id(value): name for name, value in after.items() if before[name] is value}
    for name, value in before.items():
        if after[name] is not value and not torch.equal(stored[name], stored[kept[id(after[name])]]):
            raise tied_differ(directory, name, kept[id(after[name])])


def tied_differ(directory: Path, name: str, other: str) -> CheckpointError:
    """For parameters that the configuration ties, and that are stored with different values."""
    return CheckpointError(
        f"{directory}: {name} and {other} differ, but the configuration ties them; "
        'set "tie_word_embeddings": false in config.json'
    )


class _OffloadedTensors:
    """Tensors by accelerate's map from parameters to their values in safetensors files; ``folder``: where some of the
    files are. The map maps a file anew for each tensor."""

    def __init__(self, stored: Mapping[str, torch.Tensor], folder: tempfile.TemporaryDirectory[str]) -> None:
        self._stored, self._folder = stored, folder

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        return {name: self._stored[name] for name in names}


def _stored(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """accelerate's map from parameters to their values in files, which its hooks on ``model`` share."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            found = getattr(each, "weights_map", None)
            if found is not None:
                stored: Mapping[str, torch.Tensor] = getattr(found, "dataset", found)
                return stored
    raise CheckpointError("accelerate keeps none of this model's weights on disk")
