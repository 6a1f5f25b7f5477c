"""The part of `benchmarks.experts` that trains a small mixture of experts and removes experts from it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import torch

from .criteria import _loss, _spread, _text, _train, _windows, spearman
from .measure import machine

SEEDS = (0, 1, 2)
SHARES = (0.125, 0.25, 0.5)
LENGTH = 128
HELD_OUT, CALIBRATION = 96, 64
STEPS = 500
SIZES = {
    "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 4, "num_experts": 16, "num_experts_per_tok": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
VARIANTS: Mapping[str, Sequence[Mapping[str, Any]]] = {"expert-reap": ({}, {"renormalize": False})}


def measure(criteria: Sequence[str]) -> dict[str, Any]:
    """Rise of the loss, in nats per byte, by criterion and share, and rank correlation of scores with the rise when
    one expert alone is removed: mean and spread over calibration sets."""
    from llmpruner import Catalog, plugin_manager
    from llmpruner.calibration.documents import PYDOC, read_documents

    torch.set_num_threads(1)
    started = time.process_time()
    ids = torch.frombuffer(bytearray(_text()), dtype=torch.uint8).long()
    split = len(ids) * 4 // 5
    loaded = _model()
    # While training, the loss includes the one that balances experts.
    loaded.model.config.output_router_logits = True
    _train(loaded.model, ids[:split], STEPS)
    loaded.model.config.output_router_logits = False
    topics = bytearray("\n\n".join(read_documents(PYDOC)).encode())
    other = torch.frombuffer(topics, dtype=torch.uint8)
    texts = {
        "text of the calibration's kind": _windows(ids[split:], HELD_OUT, seed=0),
        "other text": _windows(other.long(), HELD_OUT, seed=0),
    }
    dense = {name: _loss(loaded.model, rows) for name, rows in texts.items()}
    own = next(iter(texts))
    groups = loaded.graph.of_kinds(["expert"])
    truth = {g.name: _truth(loaded, g, texts[own]) - dense[own] for g in groups}
    print(f"dense {dense}", file=sys.stderr, flush=True)
    catalog = Catalog(plugin_manager(entry_points=False))
    rises, ranks = {}, {}
    for name in criteria:
        for values in VARIANTS.get(name, ({},)):
            label = " ".join([name, *(f"{key}={value}" for key, value in values.items())])
            found = [_by(loaded, groups, catalog.criteria[name](**values), ids[:split], seed) for seed in SEEDS]
            ranks[label] = _spread([mean(spearman(f[g.name], truth[g.name]) for g in groups) for f in found])
            rises[label] = {}
            for share in SHARES:
                left = [_without(loaded, groups, scores, share) for scores in found]
                for text, rows in texts.items():
                    rises[label][f"{share:.1%}, {text}"] = _spread([_loss(m, rows) - dense[text] for m in left])
            print(label, ranks[label], rises[label], file=sys.stderr, flush=True)
    return {
        "machine": machine(),
        "model": {"model_type": "olmoe", **SIZES},
        "training": {"steps": STEPS, "length": LENGTH, "bytes": split},
        "held_out": {"tokens": texts[own].numel(), "loss": {name: round(value, 4) for name, value in dense.items()}},
        "calibration": {"samples": CALIBRATION, "length": LENGTH, "seeds": list(SEEDS)},
        "cpu_seconds": round(time.process_time() - started),
        "spearman": ranks,
        "rises": rises,
    }


def _model() -> Any:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    from llmpruner import Catalog, build_graph, plugin_manager
    from llmpruner.models.model import Model

    config = OlmoeConfig(
        vocab_size=256, max_position_embeddings=LENGTH, tie_word_embeddings=False,
        router_aux_loss_coef=0.01, pad_token_id=0, bos_token_id=1, eos_token_id=2, **SIZES,
    )  # fmt: skip
    torch.manual_seed(0)
    family = Catalog(plugin_manager(entry_points=False)).families["auto"]()
    graph = build_graph(family, config)
    return Model("tiny", config, family, graph, model=OlmoeForCausalLM(config), tokenizer=None)


def _by(loaded: Any, groups: Any, criterion: Any, ids: torch.Tensor, seed: int) -> Mapping[str, torch.Tensor]:
    from llmpruner.calibration.calibration import CalibrationSet
    from llmpruner.pruning.criteria.estimate import estimate

    calibration = CalibrationSet(_windows(ids, CALIBRATION, seed=100 + seed), "training text")
    return estimate(loaded.model, loaded.graph, groups, criterion, calibration, seed=seed).by_group


def _truth(loaded: Any, group: Any, rows: torch.Tensor) -> torch.Tensor:
    """The loss when one expert alone is removed, (experts,)."""
    units = range(group.units)
    return torch.tensor(
        [_loss(_cut(loaded, {group.name: tuple(u for u in units if u != unit)}), rows) for unit in units],
        dtype=torch.float64,
    )


def _without(loaded: Any, groups: Any, scores: Mapping[str, torch.Tensor], share: float) -> Any:
    """The model without the lowest ``share`` of the experts of every layer."""
    kept = {}
    for group in groups:
        removed = set(scores[group.name].argsort(stable=True)[: round(share * group.units)].tolist())
        kept[group.name] = tuple(unit for unit in range(group.units) if unit not in removed)
    return _cut(loaded, kept)


def _cut(loaded: Any, kept: Mapping[str, tuple[int, ...]]) -> Any:
    from llmpruner.models.surgery import cut_copy

    return cut_copy(loaded.model, loaded.graph, kept, loaded.family)
