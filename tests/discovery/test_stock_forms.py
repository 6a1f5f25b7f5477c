"""Equal cuts of all layers are stock checkpoints of types that name their sizes otherwise; cuts that a class cannot run
are not offered, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from llmpruner import UnsupportedModelError, api
from llmpruner.discovery.family import AutoFamily
from llmpruner.discovery.groups import discover_graph
from llmpruner.discovery.oracle import logits
from llmpruner.discovery.tiny import random_instance, small_config
from llmpruner.discovery.verify import representative
from llmpruner.models.save import save_checkpoint
from llmpruner.structure.scope import Scope

TOKENS = torch.arange(20, 40).reshape(2, 10)


def tiny(model_type: str, folder: Path) -> Path:
    random_instance(representative(CONFIG_MAPPING[model_type](), AutoFamily())[0]).save_pretrained(folder / "dense")
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


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_layers_that_are_counted_in_a_table_outside_them_are_not_offered(model_type: str) -> None:
    """Embeddings for each layer are in one table, which a cut of layers does not follow."""
    graph = discover_graph(small_config(CONFIG_MAPPING[model_type]()))
    assert not list(graph.of_kinds(["layer"]))
    reason = "'model.embed_tokens_per_layer.weight' has a part for every layer, which does not follow"
    assert ("model.layers", 0, reason) in {(b.parameter, b.axis, b.reason) for b in graph.blocked}
    with pytest.raises(UnsupportedModelError, match=f"^this model has no layer units .*could not follow .*: {reason}"):
        Scope(("layer",), (0, 1)).groups(graph)
    if model_type == "gemma3n_text":  # token ids choose rows of several tables
        with pytest.raises(UnsupportedModelError, match=r"embed_tokens.* axis 0: token ids are read by ge in model"):
            Scope(("vocabulary",), (0,)).groups(graph)


def test_a_cut_model_that_cannot_run_is_not_saved(tmp_path: Path) -> None:
    model = random_instance(representative(CONFIG_MAPPING["llama"](), AutoFamily())[0])
    norm = model.model.norm
    norm.weight = torch.nn.Parameter(norm.weight[:-1].detach())
    with pytest.raises(UnsupportedModelError, match=r"^the cut model cannot run: in model.norm, `.*` needs a size"):
        save_checkpoint(model, tmp_path / "pruned", record=None)
    assert not (tmp_path / "pruned").exists()
