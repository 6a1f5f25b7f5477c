"""Perplexity of a model on a text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from ..calibration.windows import opening_tokens
from ..engine.statistics import divergence
from ..errors import DataError, ModelError
from ..models.numbers import autocast_to
from ..models.positions import check_table
from ..models.tokenizer import check_ids, check_one_head, tokens_of
from ..progress import QUIET, Progress
from ..values import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """``tokens``: tokens of the text in the windows. Each window of ``window`` tokens gives ``window − 1`` predictions.
    ``bos``: whether windows begin with what the tokenizer puts before a text (one token of the ``window``, as a rule;
    where it puts several, predictions are of text alone). ``nll_per_token``: mean negative log-likelihood in nats.
    ``bits_per_byte`` counts UTF-8 bytes, and is comparable between tokenizers. ``kl_per_token``: mean Kullback-Leibler
    divergence KL(reference ‖ model) of the predictions, in nats; ``top1_agreement``: share of the predictions whose
    most probable token is the reference's; both None without a reference. ``text_sha256``: of the whole text in UTF-8.
    ``text``: its name, as it was given. ``others``: the results on further texts, by their names, as JSON values of the
    same keys."""

    perplexity: float
    nll_per_token: float
    bits_per_byte: float
    tokens: int
    windows: int
    window: int
    bos: bool
    text_sha256: str
    kl_per_token: float | None = None
    top1_agreement: float | None = None
    text: str | None = None
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """JSON values, without the name of the text and the results on others."""
        return {key: value for key, value in asdict(self).items() if key not in ("text", "others")}


def perplexity(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str,
    *,
    window: int = 512,
    tokens: int | None = None,
    batch_size: int = 4,
    autocast: bool = False,
    bos: bool = True,
    reference: PreTrainedModel | None = None,
    progress: Progress = QUIET,
) -> PerplexityResult:
    """Perplexity of ``model`` on ``text``.

    The text is tokenised as one string (see `tokens_of`), without special tokens. Its first ``tokens`` tokens (default:
    all) are split into windows that do not overlap; an incomplete last window is left out. With ``bos``, each of the
    ``window`` tokens of a window begins with what the tokenizer puts before a text (BOS, as a rule), if anything, which
    is not predicted.
    Every other token but the first of its window is predicted from those before it in the window. The result is the
    exponential of the mean negative log-likelihood, accumulated in float64.

    ``autocast``: compute in bfloat16; logits are converted to float32 in both cases. With a ``reference``, the result
    has the mean of KL(reference ‖ model) over the same predictions, and the share of them whose most probable token is
    the same. Raises `DataError` when the text has too few tokens, or the table of positions of a model too few for a
    window, and `ModelError` when predictions are NaN or over another vocabulary than the reference's.
    """
    if window < 2 or batch_size < 1:
        raise DataError(
            f"perplexity needs a window of 2 or more and a batch of 1 or more, got {window} and {batch_size}"
        )
    for one in (model, reference):
        if one is not None:
            check_table(one, window, *beyond(window))
    if reference is not None:
        check_one_head(reference, model)
    opening = opening_tokens(tokenizer, text) if bos else []
    ids = tokens_of(tokenizer, text)
    used = _in_full_windows(ids, tokens, window, len(opening))
    table = check_ids(torch.tensor(used), model).view(-1, window - len(opening))
    windows = len(table)
    table = torch.cat([torch.tensor(opening, dtype=table.dtype).expand(windows, -1), table], 1)
    # The first position whose next token is counted.
    first = max(0, len(opening) - 1)
    total = total_divergence = 0.0
    agreed = 0
    for batch in progress.track(torch.split(table, batch_size), "perplexity"):
        placed = batch.to(model.device)
        logits = predictions(model, placed, autocast)[:, first:]
        total += _negative_log_likelihood(logits, placed[:, first:])
        if reference is not None and reference is not model:
            expected = predictions(reference, batch.to(reference.device), autocast)[:, first:]
            total_divergence += divergence(expected, logits)
            agreed += _agreements(expected, logits)
        check_number(total, model)
    predicted = windows * (window - first - 1)
    mean = total / predicted
    size = len((text if len(used) == len(ids) else _decoded(tokenizer, used)).encode())
    return PerplexityResult(
        perplexity=exponential(mean),
        nll_per_token=mean,
        bits_per_byte=mean / math.log(2) * len(used) / size,
        tokens=len(used),
        windows=windows,
        window=window,
        bos=bool(opening),
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        kl_per_token=None if reference is None else total_divergence / predicted,
        top1_agreement=None if reference is None else 1.0 if reference is model else agreed / predicted,
    )


def _in_full_windows(ids: list[int], tokens: int | None, window: int, opening: int) -> list[int]:
    """The first of ``ids``, at most ``tokens``, that fill windows of ``window`` tokens, each of which begins with
    ``opening`` others. Raises `DataError` where that is none."""
    if tokens is not None and len(ids) < tokens:
        raise DataError(f"the text has {counted(len(ids), 'token')}, fewer than the {tokens:,} asked for")
    of_text = window - opening
    if of_text < 1:
        raise DataError(f"a window of {window} has no room for text after the {opening} tokens before it")
    windows = min(len(ids), tokens if tokens is not None else len(ids)) // of_text
    if windows == 0:
        raise DataError(
            f"the text has {counted(len(ids), 'token')} of which {tokens or 'all'} are used: no full window of {window}"
        )
    return ids[: windows * of_text]


def beyond(window: int) -> tuple[str, str]:
    """What is beyond a model's positions, and how to get less, for messages."""
    return f"windows of {window:,} tokens", "lower --window"


def check_number(total: float, model: PreTrainedModel) -> None:
    """Raise `ModelError` where a loss of ``model`` is NaN."""
    if math.isnan(total):
        raise ModelError(
            "the model's predictions are not numbers (NaN), so it has no perplexity: its weights are damaged, or "
            f"{model.dtype} is too narrow for what it computes (try --dtype float32)"
        )


def exponential(value: float) -> float:
    """e^``value``; infinite where no float is as large."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


@torch.inference_mode()
def predictions(model: PreTrainedModel, ids_BT: torch.Tensor, autocast: bool) -> torch.Tensor:
    """Logits (B, T, V)."""
    with autocast_to(ids_BT.device.type, torch.bfloat16, enabled=autocast):
        logits_BTV: torch.Tensor = model(
            input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False
        ).logits
    return logits_BTV


def _agreements(expected_BTV: torch.Tensor, logits_BTV: torch.Tensor) -> int:
    """At how many positions, without the last of each sequence, both have the same most probable token."""
    one, other = (logits[:, :-1].argmax(-1) for logits in (expected_BTV, logits_BTV))
    return int((one == other.to(one.device)).sum())


def _negative_log_likelihood(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> float:
    # Row by row: the float32 copy of a whole batch of logits would double the memory.
    return sum(
        float(functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="none").double().sum())
        for logits, ids in zip(logits_BTV, ids_BT, strict=True)
    )


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
