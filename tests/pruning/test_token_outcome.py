"""What is told of a cut of the vocabulary: tokens by script, and the text that needed them."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from llmpruner import TokenStats
from llmpruner.calibration.calibration import CalibrationSet
from llmpruner.pruning import saving
from llmpruner.pruning.criteria.tokens import TokenUse
from llmpruner.structure.plan import GroupCut, ScriptTokens, TextTokens


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    tokens = ["a", "b", "c", "д", "а", ".", "!", "ab", "да", "abc"]
    merges = [("a", "b"), ("д", "а"), ("ab", "c")]
    backend = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, merges))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_scripts_and_text_of_a_cut_by_hand(tokenizer, monkeypatch):
    monkeypatch.setattr(saving, "SCRIPTS", 2)
    ids = torch.tensor([[7, 9]] * 7 + [[8, 7]])  # ababc; the eighth that is not counted: даab
    cut = GroupCut(kind="vocabulary", units=11, kept=range(8))
    found = saving.token_outcome(tokenizer, cut, CalibrationSet(ids, "by hand"))
    assert (found.before, found.after) == (11, 8)
    assert found.scripts == (
        ScriptTokens("LATIN", 5, 1, ("abc",)), ScriptTokens("CYRILLIC", 3, 1, ("да",)), ScriptTokens("other", 3, 1, ()),
    )  # fmt: skip
    assert found.texts == {"counted": TextTokens(14, 7, 5 / 2, 5 / 3), "held_out": TextTokens(2, 1, 6 / 2, 6 / 3)}
    assert ("held-out text", "3.00 bytes per token before, 2.00 after", "1", "2", "50.00%") in found.table()[1]
    assert saving.token_outcome(tokenizer, cut, None).scripts == found.scripts


def test_tokens_that_the_model_has_no_row_for_have_no_score(tokenizer, tmp_path):
    """As a padding token that was added to the tokenizer alone."""
    (tmp_path / "keep.txt").write_text("ab!")
    use = TokenStats(torch.ones(8, dtype=torch.int64), torch.zeros(8, dtype=torch.float64), 8, tokenizer)
    plain, chosen = (TokenUse(**own).score_tokens(use) for own in ({}, {"keep": str(tmp_path / "keep.txt")}))
    assert ((chosen - plain).nonzero().flatten().tolist()) == [6, 7]
    foreign = TokenUse(scripts="latin").score_tokens(use) < plain / 2
    assert foreign.nonzero().flatten().tolist() == [3, 4]
