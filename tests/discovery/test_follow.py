"""A rule about what must follow a cut applies to the groups that it was found for."""

from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING, MambaConfig

from llmpruner import Catalog, build_graph
from llmpruner.discovery.oracle import logits
from llmpruner.discovery.tiny import random_instance, small_config
from llmpruner.discovery.verify import representative
from llmpruner.models.surgery import cut, silence
from llmpruner.plugins.manager import plugin_manager


def test_an_equal_number_of_another_module_stays() -> None:
    """Jamba's `time_step_rank` follows the cut of its own channels, which are of the kind `mlp` as those of the layer's
    MLP are. After a first cut, the MLP had as many as the rank, and a second cut made the rank smaller too."""
    small = small_config(representative(CONFIG_MAPPING["jamba"]()))
    family = Catalog(plugin_manager()).families["auto"]()
    model, graph = random_instance(small, 0), build_graph(family, small)
    rank = model.get_submodule("model.layers.0.mamba").time_step_rank
    (mlp,) = [g for g in graph.of_kinds(["mlp"]) if g.layer == 0 and "feed_forward" in g.spans[0].parameter]
    again = cut(model, graph, {mlp.name: tuple(range(rank))}, family)
    assert again.by_name[mlp.name].units == rank
    half = {mlp.name: tuple(range(rank // 2))}
    reference = random_instance(small, 0)
    silence(reference, graph, half)
    cut(model, again, half, family)
    assert model.get_submodule("model.layers.0.mamba").time_step_rank == rank
    ids = torch.arange(8)[None]
    torch.testing.assert_close(logits(model, ids), logits(reference, ids))


def test_two_groups_of_a_module_with_equal_numbers_of_units() -> None:
    """Mamba's rank and channels are of one kind and lie in one module. With as many of each, `time_step_rank` followed
    the channels, so that the cut model could not run."""
    config = MambaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    family = Catalog(plugin_manager()).families["auto"]()
    model, graph = random_instance(config, 0), build_graph(family, config)
    rank, channels = [
        [g for g in graph.of_kinds(["mlp"]) if any(s.parameter.endswith(end) and s.axis == 1 for s in g.spans)]
        for end in ("dt_proj.weight", "out_proj.weight")
    ]
    assert {g.units for g in (*rank, *channels)} == {32}
    kept = {g.name: tuple(range(1, 28)) for g in channels} | {g.name: tuple(range(3, 23)) for g in rank}
    reference = random_instance(config, 0)
    silence(reference, graph, kept)
    cut(model, graph, kept, family)
    assert [model.get_submodule(f"backbone.layers.{n}.mixer").time_step_rank for n in range(2)] == [20, 20]
    ids = torch.arange(8)[None]
    torch.testing.assert_close(logits(model, ids), logits(reference, ids))
