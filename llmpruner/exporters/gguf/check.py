"""Comparing a written file with its model: logits, and tokens of a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer

from ...errors import CheckpointError
from ...models.gguf import RECORDED_PRE
from . import pretokenizers, runtime
from .reference import gguf_logits
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 32
TOLERANCES = {"f32": 1e-3, "f16": 2e-2, "bf16": 1e-1, "q8_0": 1e-1}
"""Of the norm of a position's centred logits, by type of file. Unrelated logits have an error of about 1.4."""
_COARSE = 0.7
"""For types of fewer bits."""
_RUNTIME = 1e-2
"""At least this for llama.cpp, which looks GELU up in a table of float16."""
_DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}

TEXT = (
    "Hello world! It's 3 o'clock, isn't it?  Two  blanks,\na new line,\n\n\ttabs; 12345 numbers 3.14, "
    "naïve café, 你好世界, привет мир, 🙂 (and so on) -- a_b = c[0] / d;"
)


def check_logits(model: PreTrainedModel, path: Path, kind: str) -> str:
    """Compare the logits of ``path`` with those of ``model``; returns how.

    ``kind``: the type of the file. Files of float types are computed from the file alone, and by llama.cpp where it is
    installed; quantised ones by llama.cpp. Raises `CheckpointError` where they differ.
    """
    ids = _prompt(model)
    device = model.get_input_embeddings().weight.device
    with torch.no_grad():
        expected = model(ids[None].to(device), use_cache=False).logits[0].float().cpu()
    kinds = {kind, _DTYPES.get(model.dtype, "f32")}
    if kind in _DTYPES.values():
        _compare(expected, gguf_logits(path, ids), kinds, f"{path.name}, read again,")
    if not runtime.is_installed():
        return f"verified by reading it back; install {runtime.PACKAGE} to run it"
    _compare(expected, runtime.runtime_logits(path, ids), kinds, f"llama.cpp with {path.name}", least=_RUNTIME)
    return "verified by llama.cpp's logits"


def _prompt(model: PreTrainedModel) -> torch.Tensor:
    """Random token numbers: a model that repeats its input would hide mistakes in attention."""
    length = min(_TOKENS, model.config.get_text_config().max_position_embeddings)
    rows = model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, rows, (length,), generator=torch.Generator().manual_seed(0))


def relative_errors(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """For each position, the norm of the difference, as a share of the norm of the centred logits: (T,)."""
    centred = expected - expected.mean(-1, keepdim=True)
    errors: torch.Tensor = (found - expected).norm(dim=-1) / centred.norm(dim=-1).clamp(min=1e-6)
    return errors


def _compare(expected: torch.Tensor, found: torch.Tensor, kinds: set[str], what: str, least: float = 0.0) -> None:
    tolerance = max(least, *(TOLERANCES.get(kind, _COARSE) for kind in kinds))
    if expected.shape != found.shape:
        raise CheckpointError(f"{what} gives logits {tuple(found.shape)}, the model {tuple(expected.shape)}")
    errors = relative_errors(expected, found)
    # Rounding to fewer bits may send a token to other experts, which changes single positions much.
    error = float(errors.max() if kinds == {"f32"} else errors.median())
    if not error <= tolerance:
        raise CheckpointError(f"{what} gives other logits than the model: relative error {error:.3g} ({tolerance:g})")


def check_tokens(tokenizer: Any | None, vocabulary: Vocabulary, path: Path) -> None:
    """Compare llama.cpp's tokens of a text with the tokenizer's, where llama.cpp is installed.

    Raises `CheckpointError` where they differ.
    """
    if tokenizer is None or not runtime.is_installed():
        return
    expected = _expected_tokens(tokenizer, vocabulary)
    found = runtime.runtime_tokens(path, TEXT)
    if found != expected:
        same = next((n for n, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found))
        raise CheckpointError(
            f"llama.cpp splits text into other tokens than the tokenizer, from token {same} of a test text on "
            f"({tokenizer.decode(expected[same : same + 3])!r} …); where '{vocabulary.pre}' is the wrong name for how "
            "it splits text, give the right one: --set gguf.pre=NAME"
        )


def _expected_tokens(tokenizer: Any, vocabulary: Vocabulary) -> list[int]:
    """The tokens of the tokenizer. One that transformers read from a GGUF file splits text by the rule that the
    file names, which transformers does not keep."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    if vocabulary.pre is not None and vocabulary.pre == tokenizer.init_kwargs.get(RECORDED_PRE):
        backend["pre_tokenizer"] = pretokenizers.steps_of(vocabulary.pre) or backend["pre_tokenizer"]
    tokens: list[int] = Tokenizer.from_str(json.dumps(backend)).encode(TEXT).ids
    return tokens
