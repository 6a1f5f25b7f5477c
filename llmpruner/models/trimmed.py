"""A dense model in the tokens of a trimmed one, to measure and to train the trimmed model by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .model import Model

_NEVER = -1e4  # a logit of probability 0


def old_ids(dense: Any, trimmed: Any) -> list[int] | None:
    """The ids that the tokenizer ``dense`` has for the tokens of ``trimmed``; None unless it has all, in order."""
    if dense is None or not getattr(trimmed, "is_fast", False):
        return None
    before, after = dense.get_vocab(), trimmed.get_vocab()
    old = [before.get(token, -1) for token in sorted(after, key=after.__getitem__)]
    ascending = all(one < other for one, other in pairwise([-1, *old]))
    return old if ascending and len(old) == max(after.values()) + 1 else None


def in_tokens_of(trimmed: Model, dense: Model, *, teaching: bool = False) -> Any:
    """The network of ``dense``: as `InTokens` where ``trimmed`` has fewer of its tokens, else as it is."""
    rows, before = (model.model.get_input_embeddings().weight.shape[0] for model in (trimmed, dense))
    old = None if rows >= before else old_ids(dense.tokenizer, trimmed.tokenizer)
    if old is None:
        return dense.model
    tokenizer, whole, kept = trimmed.tokenizer, dense.tokenizer, {*old}
    assert tokenizer is not None and whole is not None, "they were compared"
    split = tokenizer.backend_tokenizer.model.tokenize
    pieces = {n: tuple(piece.id for piece in split(token)) for token, n in whole.get_vocab().items() if n not in kept}
    # There may be rows that no token has, or added tokens without a row.
    old = [*old, *range(len(whole), len(whole) + rows - len(old))][:rows]
    return InTokens(dense.model, old, pieces, teaching)


class InTokens(nn.Module):
    """``model``, which reads and predicts the tokens of a trimmed vocabulary. It reads removed tokens whole, as it was
    trained to, not in the pieces in which they arrive; its logits, (B, T, kept tokens), are those after each token that
    ends where one of its own does. Without ``teaching``, they are those of the kept tokens, and 0 inside a removed one.

    With ``teaching``, a removed token counts for its first piece, with its probability, and after that its next piece
    is certain. Trained toward the kept tokens alone, a model would not learn to write the pieces.

    ``old``: the id in ``model`` of each token. ``pieces``: those of each removed token, by its id in ``model``.
    """

    def __init__(self, model: Any, old: Sequence[int], pieces: Mapping[int, tuple[int, ...]], teaching: bool) -> None:
        super().__init__()
        self.model, self.device, self.teaching = model, model.device, teaching
        self.wholes = {(new,): before for new, before in enumerate(old)} | {p: token for token, p in pieces.items()}
        self.longest: dict[int, int] = {}
        counts_for = [len(old)] * len(model.get_input_embeddings().weight)
        for parts, token in self.wholes.items():
            self.longest[parts[0]] = max(len(parts), self.longest.get(parts[0], 1))
            counts_for[token] = parts[0]
        self.old, self.counts_for = torch.tensor(old).to(self.device), torch.tensor(counts_for).to(self.device)

    def read(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """The tokens of ``model`` that ``ids`` are, and at which of ``ids`` each of them ends."""
        own: list[int] = []
        ends: list[int] = []
        start = 0
        while start < len(ids):
            parts = (tuple(ids[start : start + length]) for length in range(self.longest[ids[start]], 0, -1))
            whole = next(part for part in parts if part in self.wholes)
            start += len(whole)
            own.append(self.wholes[whole])
            ends.append(start - 1)
        return own, ends

    def agree(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Whether after each of the tokens the next one is the same token in both vocabularies, (T,)."""
        ends = torch.zeros(len(ids_T) + 1, dtype=torch.bool)
        ends[self.read(ids_T.tolist())[1]] = True
        return ends[:-1] & ends[1:]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> Any:
        places = [mask.nonzero()[:, 0] for mask in attention_mask]
        read = [self.read(ids[place].tolist()) for ids, place in zip(input_ids, places, strict=True)]
        own_BS = nn.utils.rnn.pad_sequence([torch.tensor(own) for own, _ in read], True, -1).to(self.device)
        mask_BS = (own_BS >= 0).long()
        logits_BSV = self.model(input_ids=own_BS.clamp_min(0), attention_mask=mask_BS, use_cache=use_cache).logits
        kept, dtype = len(self.old), torch.float32 if self.teaching else logits_BSV.dtype
        found_BTK = logits_BSV.new_zeros((*input_ids.shape, kept), dtype=dtype)
        for row, (own, ends) in enumerate(read):
            logits_SK = logits_BSV[row, : len(own)][:, self.old]
            if self.teaching:
                found_BTK[row].fill_(_NEVER).scatter_(1, input_ids[row].roll(-1)[:, None], 0.0)
                p_SV = logits_BSV[row, : len(own)].float().softmax(-1)
                p_SK = p_SV.new_zeros((len(own), kept + 1)).index_add_(1, self.counts_for, p_SV)[:, :kept]
                logits_SK = p_SK.log().clamp_min_(_NEVER)
            found_BTK[row, places[row][ends]] = logits_SK
        return SimpleNamespace(logits=found_BTK)
