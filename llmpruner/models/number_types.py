"""The types of numbers that a checkpoint stores its weights in: whole numbers are none, unless it is quantised.

Loading casts what it reads to the type of the model, so that weights whose scales are missing would pass for weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, UnsupportedModelError
from .quiet import quiet_transformers
from .shards import opened
from .torch_files import can_be_mapped, mapped, torch_files

if TYPE_CHECKING:
    from torch import nn

_FLOATS = ("F", "BF")
"""How safetensors' names of floating-point types begin, those of 8 bits included."""


def check_stored_types(directory: Path, model: nn.Module) -> None:
    """Raise `CheckpointError` for a weight of ``model`` that the files of ``directory`` do not store as floating-point
    numbers. Reads headers alone. ``model``: on any device; its parameters of whole numbers may be stored as such."""
    weights = {name for name, value in model.named_parameters(remove_duplicate=False) if value.is_floating_point()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for file, name, kind in _stored_types(directory):
        known = {name, prefix + name, name.removeprefix(prefix)} & weights
        # Buffers of older versions (masks) are whole numbers, and no weights. Converted tensors have other names.
        if known or name.endswith(".weight"):
            raise CheckpointError(
                f"{file}: tensor '{name}' is stored as {kind}, which weights are only in a quantised model, and the "
                "configuration names no quantisation; download it again, or restore quantization_config"
            )


def _stored_types(directory: Path) -> Iterator[tuple[Path, str, str]]:
    """(file, tensor, type) of the tensors that are no floating-point numbers. Files of PyTorch before 1.6, which
    cannot be mapped, are left out."""
    files = sorted(directory.glob("*.safetensors"))
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                kind = tensors.get_slice(name).get_dtype()
                if not kind.startswith(_FLOATS):
                    yield file, name, kind
    stored = [] if files else torch_files(directory)
    for file in stored if can_be_mapped(stored) else ():
        for name, tensor in mapped(file).items():
            if not tensor.is_floating_point():
                yield file, name, str(tensor.dtype).removeprefix("torch.")


def check_quantisation(config: Any, text: str) -> None:
    """Raise `UnsupportedModelError` where ``config`` names a quantisation that transformers does not support: it
    would load packed weights as they are. ``text``: the reference of the model."""
    from transformers.quantizers import AutoHfQuantizer

    stated = getattr(config, "quantization_config", None)
    if stated is None:
        return
    values = stated if isinstance(stated, dict) else stated.to_dict()
    method = values.get("quant_method")
    try:
        with quiet_transformers():
            known = AutoHfQuantizer.supports_quant_method(values)
    except (TypeError, ValueError):  # no name, or no text
        known = False
    if not known:
        raise UnsupportedModelError(
            f"the configuration of '{text}' names the quant_method '{method}', which transformers does not know; "
            "correct quantization_config, or remove it if the weights are not quantised"
        )
