"""The calibration source of all tokens of a vocabulary. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import DataError
from .opening import opening_tokens
from .source import CalibrationSource, SampleTask

if TYPE_CHECKING:
    import torch


class VocabularySource(CalibrationSource):
    """Every token of the vocabulary but special ones, in random order; all are used before one is used again. Each
    sample begins with what the tokenizer puts before a text (BOS, as a rule).

    What the first layers compute of a token depends on little else than the token, and text, above all text that the
    model writes, has few of the rare ones. Mixed into text, these samples let a fit see them.
    """

    name = "vocabulary"
    summary = "all tokens of the vocabulary in random order, to be mixed into text: 7*self,1*vocabulary"
    judged = False

    def check(self, reference: str) -> None:
        if reference:
            raise DataError(f"--calibration vocabulary:{reference}: nothing follows 'vocabulary'")

    def sample(self, task: SampleTask) -> torch.Tensor:
        import torch

        # Rows of an embedding beyond the tokenizer's are never read.
        size, special, opening = task.model.get_input_embeddings().weight.shape[0], set[int](), list[int]()
        if task.tokenizer is not None:
            size, special = min(size, len(task.tokenizer)), set(task.tokenizer.all_special_ids)
            opening = opening_tokens(task.tokenizer, "a")[: task.length - 1]
        tokens = torch.tensor([token for token in range(size) if token not in special])
        generator = torch.Generator().manual_seed(task.seed)
        wanted = task.samples * (task.length - len(opening))
        rounds = [tokens[torch.randperm(len(tokens), generator=generator)] for _ in range(-(-wanted // len(tokens)))]
        rows = torch.cat(rounds)[:wanted].view(task.samples, -1)
        return torch.cat([torch.tensor(opening, dtype=torch.long).expand(task.samples, -1), rows], 1)
