"""Equal cuts of all layers are stock checkpoints of types that name their sizes otherwise; a cut that the class cannot
run is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from llmpruner import UnsupportedModelError, api
from llmpruner.oracle.tiny import random_instance
from llmpruner.oracle.verify import logits, representative

TOKENS = torch.arange(20, 40).reshape(2, 10)


def tiny(model_type: str, folder: Path) -> Path:
    random_instance(representative(CONFIG_MAPPING[model_type]())).save_pretrained(folder / "dense")
    return folder / "dense"


@pytest.mark.parametrize(
    ("model_type", "size"),
    [("bart", "decoder_ffn_dim"), ("falcon", "ffn_hidden_size"), ("gpt2", "n_inner"), ("opt", "ffn_dim")],
)
def test_the_width_has_another_name(model_type: str, size: str, tmp_path: Path) -> None:
    pruned = api.prune(
        tiny(model_type, tmp_path), kinds="mlp", unit_ratio=0.3, importance="l2", compensate="none",
        method="llm-pruner", shape="uniform",
    )  # fmt: skip
    assert api.save(pruned, tmp_path / "pruned") == "stock"
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", attn_implementation="eager")
    assert type(loaded).__module__.startswith("transformers.")
    assert getattr(loaded.config, size) == pruned.graph.of_kinds(["mlp"])[0].units
    assert torch.allclose(logits(loaded.eval(), TOKENS), logits(pruned.model, TOKENS), atol=1e-5)


def test_layers_that_are_counted_in_a_table_outside_them(tmp_path: Path) -> None:
    """Gemma 4 has embeddings for each layer in one table, which a cut of layers does not follow."""
    pruned = api.prune(
        tiny("gemma4_text", tmp_path), kinds="layer", unit_ratio=0.34, importance="l2", compensate="none",
        method="llm-pruner",
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"^the cut model cannot run: in model, `.*` needs a size that the"):
        api.save(pruned, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()
