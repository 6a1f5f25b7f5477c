"""Models of which transformers leaves some parameters in float32 in any dtype, with which not all run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..engine.weights import StreamedWeights

_NARROW = frozenset({torch.bfloat16, torch.float16})


def check_runs(text: str, model: PreTrainedModel, streamed: StreamedWeights | None = None) -> None:
    """Run ``model`` on a few tokens where its class made parameters in float32 beside those of 16 bits, other than the
    ones that it names as kept so (XLNet). Raises `ModelError` where its operators refuse the two dtypes together.
    ``text``: the reference; ``streamed``: what reads the weights, if they are not in memory."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    narrow = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values() if dtype in _NARROW})
    meant = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    wide = [name for name, dtype in dtypes.items() if dtype == torch.float32 and not any(m in name for m in meant)]
    if not narrow or not wide:
        return
    try:
        with torch.no_grad():
            # Weights that are not in memory are read for it, a layer at a time.
            device = model.device if streamed is None else streamed.device
            model(input_ids=torch.arange(4, device=device)[None], use_cache=False)
    except RuntimeError as error:
        raise ModelError(
            f"'{text}' does not run in {narrow[0]}: transformers has parameters of this architecture in float32 in any "
            f"dtype ('{wide[0]}'), and its operators refuse both together; give --dtype float32"
        ) from error
