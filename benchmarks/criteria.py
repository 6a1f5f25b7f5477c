"""Which criteria know what a unit is worth: rank correlation with the truth, by brute force.

    LLMPRUNER_DATA=… python -m benchmarks.criteria              train, silence every unit once, score, compare
    LLMPRUNER_DATA=… python -m benchmarks.criteria --render     only write the table of docs/criteria-measured.md again

A tiny LLaMA (grouped-query attention) learns WikiText-2 byte by byte. The truth about a unit is by how much the loss on
held-out text rises when it alone is silenced. Writes ``benchmarks/results/criteria.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmpruner import Catalog, ImportanceCriterion, build_graph, load_catalog
from llmpruner.discovery.opening import family_for
from llmpruner.engine.walk import CalibrationSet
from llmpruner.models.model import Model
from llmpruner.models.reference import Reference
from llmpruner.plugins.manager import PluginManager
from llmpruner.pruning.criteria.estimate import estimate
from llmpruner.structure.coupling import LAYER, VOCABULARY, Role
from llmpruner.testing import settings_grid

from .measure import as_json, data_folder, machine, write_table

RESULTS = Path(__file__).parent / "results" / "criteria.json"
PAGE = Path(__file__).parents[1] / "docs" / "criteria-measured.md"
SEEDS = (0, 1, 2)
LENGTH = 128
TRAIN = {"steps": 500, "batch": 32, "rate": 3e-3}
HELD_OUT, CALIBRATION = 96, 64
FEW = 8
"""Ranks within a group of fewer units say nothing."""


def main() -> None:
    if "--render" not in sys.argv:
        lines = (data_folder() / "wikitext2_unk_validation.jsonl").read_text(encoding="utf-8").splitlines()
        text = "".join(json.loads(line)["page"] for line in lines)
        RESULTS.write_text(as_json(measure(text.encode())), encoding="utf-8")
    write_table(PAGE, "criteria", table(json.loads(RESULTS.read_text(encoding="utf-8"))))


def measure(text: bytes) -> dict[str, Any]:
    torch.set_num_threads(1)
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    split = len(ids) * 4 // 5
    loaded = _model()
    _train(loaded.network, ids[:split])
    held_out = _windows(ids[split:], HELD_OUT, seed=0)
    dense = _loss(loaded.network, held_out)
    kinds = [kind for kind in loaded.graph.kinds if kind != VOCABULARY]
    truth = {group.name: _truth(loaded, group, held_out, dense) for group in loaded.graph.of_kinds(kinds)}
    rows = {}
    for label, criterion in _criteria():
        scored = list(filter(criterion.accepts, kinds))
        if not scored:
            continue
        runs = [_correlations(loaded, criterion, scored, truth, ids[:split], seed) for seed in SEEDS]
        rows[label] = {
            kind: {how: _spread([run[kind][how] for run in runs]) for how in runs[0][kind]} for kind in runs[0]
        }
    return {
        "machine": machine(),
        "model": {k: getattr(loaded.config, k) for k in ("hidden_size", "intermediate_size", "num_hidden_layers")},
        "training": {**TRAIN, "length": LENGTH, "bytes": split},
        "held_out": {"tokens": held_out.numel(), "loss": round(dense, 4)},
        "calibration": {"samples": CALIBRATION, "length": LENGTH, "seeds": list(SEEDS)},
        "truth": {name: [round(v, 6) for v in values.tolist()] for name, values in truth.items()},
        "spearman": rows,
    }


def _model() -> Any:
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    family = family_for(load_catalog(), config)
    return Model(
        Reference("tiny"), config, family, build_graph(family, config), model=LlamaForCausalLM(config), tokenizer=None
    )


def _train(model: Any, ids: torch.Tensor) -> None:
    steps, batch, rate = TRAIN["steps"], TRAIN["batch"], TRAIN["rate"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        rows = _windows(ids, batch, seed=1000 + step)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: {float(loss.detach()):.3f}", file=sys.stderr, flush=True)
    model.eval()


def _windows(ids: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    starts = torch.randint(len(ids) - LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([ids[start : start + LENGTH] for start in starts.tolist()])


@torch.no_grad()
def _loss(model: Any, rows: torch.Tensor) -> float:
    return mean(float(model(input_ids=part, labels=part).loss) for part in rows.split(32))


def _truth(loaded: Any, group: Any, held_out: torch.Tensor, dense: float) -> torch.Tensor:
    """By how much the loss rises, nats per token, when one unit is silenced: (units,)."""
    rises = []
    for unit in range(group.units):
        with _silenced(loaded, group, unit):
            rises.append(_loss(loaded.network, held_out) - dense)
    return torch.tensor(rises, dtype=torch.float64)


@contextmanager
def _silenced(loaded: Any, group: Any, unit: int) -> Iterator[None]:
    model = loaded.network
    if group.kind == LAYER:
        layer = model.get_submodule(f"{loaded.graph.layers}.{unit}")
        handle = layer.register_forward_hook(lambda _, args, __: args[0])
        yield
        handle.remove()
        return
    role = Role.PRODUCES if group.is_normalized else Role.CONSUMES
    spans = [(model.get_parameter(s.parameter).data, s.axis, torch.tensor(list(s.index.of(unit))))
             for s in group.spans_with(role)]  # fmt: skip
    before = [parameter.index_select(axis, index) for parameter, axis, index in spans]
    for parameter, axis, index in spans:
        parameter.index_fill_(axis, index, 0.0)
    yield
    for (parameter, axis, index), values in zip(spans, before, strict=True):
        parameter.index_copy_(axis, index, values)


def _criteria() -> Iterator[tuple[str, Any]]:
    for name, cls in Catalog(PluginManager(entry_points=False))[ImportanceCriterion].items():
        for criterion in settings_grid(cls):
            yield f"{name} {criterion.record().get('variant', '')}".strip(), criterion


def _correlations(
    loaded: Any, criterion: Any, kinds: Sequence[str], truth: Mapping[str, torch.Tensor], ids: torch.Tensor, seed: int
) -> dict[str, dict[str, float]]:
    """Kind → Spearman's ρ within a layer (mean over layers) and across all units of the kind."""
    calibration = CalibrationSet(_windows(ids, CALIBRATION, seed=100 + seed), "training text")
    correlations: dict[str, dict[str, float]] = {}
    for kind in kinds:
        groups = loaded.graph.of_kinds([kind])
        scores = estimate(loaded.network, loaded.graph, groups, criterion, calibration, seed=seed)
        pooled = [torch.cat([values[g.name] for g in groups]) for values in (scores, truth)]
        correlations[kind] = {"across": spearman(*pooled)}
        if groups[0].units >= FEW and len(groups) > 1:
            correlations[kind]["within"] = mean(spearman(scores[g.name], truth[g.name]) for g in groups)
    return correlations


def spearman(one: torch.Tensor, other: torch.Tensor) -> float:
    """Spearman's rank correlation; ties share their mean rank."""
    ranks = torch.stack([_ranks(one), _ranks(other)])
    return float(torch.corrcoef(ranks)[0, 1].nan_to_num(0.0))


def _ranks(values: torch.Tensor) -> torch.Tensor:
    below = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return below.double() + (equal.double() - 1) / 2


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": round(mean(values), 3), "spread": round(pstdev(values), 3)}


def table(results: Mapping[str, Any]) -> str:
    """The correlations as the page shows them."""
    columns = {
        "MLP channel, within a layer": ("mlp", "within"), "across layers": ("mlp", "across"),
        "KV group": ("attention", "across"), "query head": ("query", "across"),
        "hidden channel": ("hidden", "across"), "layer": ("layer", "across"),
    }  # fmt: skip
    lines = ["| criterion | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for label, kinds in results["spearman"].items():
        cells = [kinds.get(kind, {}).get(how) for kind, how in columns.values()]
        shown = ["" if c is None else f"{c['mean']:.2f} ± {c['spread']:.2f}" for c in cells]
        lines.append(f"| `{label}` | " + " | ".join(shown) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
