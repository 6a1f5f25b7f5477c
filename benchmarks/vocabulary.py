"""A calibration source of all tokens of a vocabulary, for `benchmarks.ablation`: it did not help, so that the package
does not have it.

What the first layers compute of a token depends on little else than the token, and text, above all text that a model
writes, has few of the rare ones.
"""

from __future__ import annotations

import torch

from llmpruner import CalibrationSource, SampleTask, hookimpl


class VocabularySource(CalibrationSource):
    """Every token but special ones, in random order; all are used before one is used again."""

    name = "vocabulary"

    def sample(self, task: SampleTask) -> torch.Tensor:
        assert task.tokenizer is not None
        special = set(task.tokenizer.all_special_ids)
        tokens = torch.tensor([token for token in range(len(task.tokenizer)) if token not in special])
        generator = torch.Generator().manual_seed(task.seed)
        wanted = task.samples * task.length
        rounds = [tokens[torch.randperm(len(tokens), generator=generator)] for _ in range(-(-wanted // len(tokens)))]
        return torch.cat(rounds)[:wanted].view(task.samples, task.length)


@hookimpl
def llmpruner_calibration_sources() -> list[type[CalibrationSource]]:
    return [VocabularySource]
