"""What is told of a cut of the vocabulary: tokens by script, and the text that needed them."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from llmpruner.calibration.calibration import CalibrationSet
from llmpruner.pruning import saving
from llmpruner.structure.plan import GroupCut, ScriptTokens, TextTokens


def test_scripts_and_text_of_a_cut_by_hand(monkeypatch):
    monkeypatch.setattr(saving, "SCRIPTS", 2)
    tokens = ["a", "b", "c", "д", "а", ".", "!", "ab", "да", "abc"]
    merges = [("a", "b"), ("д", "а"), ("ab", "c")]
    backend = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, merges))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
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
