"""Loss, perplexity and divergence of a model on a text."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from ..calibration.windows import opening_tokens
from ..engine.statistics import divergences
from ..errors import DataError, ModelError
from ..models.devices import doubled, multiplies_bfloat16_fast
from ..models.numbers import autocast_to
from ..models.tokenizer import check_ids, check_one_head, tokens_of
from ..models.vocabulary import InTokens
from ..progress import QUIET, Progress
from ..values import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """``tokens``: of the text in the windows. ``bos``: whether windows begin with what the tokenizer puts before a
    text. ``nll_per_token``: in nats. ``bits_per_byte``: of UTF-8, comparable between tokenizers.
    ``kl_per_token``: mean KL(reference ‖ model) in nats; ``top1_agreement``: share of predictions whose most probable
    token is the reference's; both None without a reference. ``text_sha256``: of the whole text in UTF-8.

    A reference with a larger vocabulary reads the text in its own tokens. It is compared over the tokens that the model
    kept, where its next token is one of them; ``bits_per_byte`` has the cost of the others.
    """

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


class Scored:
    """Sums over predictions: negative log-likelihood and KL(reference ‖ model) in nats; numbers of tokens."""

    def __init__(self, model: PreTrainedModel, reference: PreTrainedModel | None, autocast: bool) -> None:
        if reference is not None:
            check_one_head(reference, model)
        self.model, self.reference = model, reference
        self._autocast = autocast and multiplies_bfloat16_fast(model.device.type)
        self.nll = self.kl = 0.0
        self.tokens = self.compared = self.agreed = 0

    def add(self, ids_BT: torch.Tensor, at_N: torch.Tensor) -> None:
        """``at_N``: positions, of every row, after which a token is predicted that counts."""
        logits_BTV = self._predictions(self.model, ids_BT)
        compares = self.reference is not None and self.reference is not self.model
        expected_BTV = self._predictions(self.reference, ids_BT) if compares else None
        # Row by row: the float32 copy of a whole batch of logits would double the memory.
        for row, ids in enumerate(ids_BT):
            logits_NV = logits_BTV[row, at_N]
            next_N = ids[at_N + 1].to(logits_NV.device)
            self.nll += float(doubled(functional.cross_entropy(logits_NV.float(), next_N, reduction="none")).sum())
            self.tokens += len(at_N)
            if expected_BTV is None:
                self.compared += len(at_N)
                self.agreed += len(at_N)
                continue
            expected_NV = expected_BTV[row, at_N]
            if isinstance(self.reference, InTokens):
                agree_N = self.reference.agree(ids)[at_N]
                expected_NV, logits_NV = expected_NV[agree_N], logits_NV[agree_N]
            self.compared += len(logits_NV)
            self.kl += float(doubled(divergences(expected_NV, logits_NV)).sum())
            self.agreed += int((expected_NV.argmax(-1) == logits_NV.argmax(-1).to(expected_NV.device)).sum())
        if math.isnan(self.nll):
            raise ModelError(
                "the model's predictions are not numbers (NaN), so it has no perplexity: its weights are damaged, or "
                f"{self.model.dtype} is too narrow for what it computes (try --dtype float32)"
            )

    @torch.inference_mode()
    def _predictions(self, model: Any, ids_BT: torch.Tensor) -> Any:
        """Logits (B, T, V)."""
        ids_BT = ids_BT.to(model.device)
        with autocast_to(model.device.type, torch.bfloat16, enabled=self._autocast):
            output = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False)
        return output.logits

    def means(self) -> dict[str, float | None]:
        """``perplexity``, infinite where no float is as large, and means per token."""
        mean, compared = self.nll / self.tokens, self.compared if self.reference is not None else 0
        return {
            "perplexity": math.exp(mean) if mean < 709 else math.inf,
            "nll_per_token": mean,
            "kl_per_token": self.kl / compared if compared else None,
            "top1_agreement": self.agreed / compared if compared else None,
        }


def perplexity(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str,
    *,
    window: int = 512,
    tokens: int | None = None,
    batch_size: int = 4,
    autocast: bool = False,
    reference: PreTrainedModel | None = None,
    progress: Progress = QUIET,
) -> PerplexityResult:
    """Perplexity of ``model`` on ``text``: the exponential of the mean negative log-likelihood, summed in float64.

    The text is tokenised as one string and split into windows that do not overlap; an incomplete last one is left out.
    Each begins with what the tokenizer puts before a text, which is not predicted. Every other token but the first is
    predicted from those before it in its window. Raises `DataError` when the text has too few tokens, and `ModelError`
    when predictions are NaN or over another vocabulary than the reference's.
    """
    scored = Scored(model, reference, autocast)
    opening, ids = opening_tokens(tokenizer, text), tokens_of(tokenizer, text)
    if tokens is not None and len(ids) < tokens:
        raise DataError(f"the text has {counted(len(ids), 'token')}, fewer than the {tokens:,} asked for")
    of_text = window - len(opening)
    windows = len(ids[:tokens]) // of_text if of_text > 0 else 0
    if windows == 0:
        raise DataError(
            f"the text has {counted(len(ids), 'token')} of which {tokens or 'all'} are used: no full window of {window}"
        )
    used = ids[: windows * of_text]
    table = check_ids(torch.tensor(used), model).view(windows, of_text)
    table = torch.cat([torch.tensor(opening, dtype=table.dtype).expand(windows, -1), table], 1)
    predicting = torch.arange(max(0, len(opening) - 1), window - 1)
    for batch in progress.track(torch.split(table, batch_size), "perplexity"):
        scored.add(batch, predicting)
    means: dict[str, Any] = scored.means()
    read = text
    if len(used) < len(ids):
        read = tokenizer.decode(used, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    bits = means["nll_per_token"] / math.log(2) * len(used) / len(read.encode())
    return PerplexityResult(
        **means, bits_per_byte=bits, tokens=len(used), windows=windows, window=window, bos=bool(opening),
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
    )  # fmt: skip
