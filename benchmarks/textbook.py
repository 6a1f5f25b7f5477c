"""LLM-Pruner's first-order Taylor pruning as a textbook writes it: the whole model in memory, one backward pass by
autograd, weights sliced in place.

    python -m benchmarks.textbook MODEL CALIBRATION OUT

``CALIBRATION``: JSON list of token ids, (samples, length). In each of the layers that are not protected, as many MLP
channels go: those with the smallest Σ|g·w| over the weights that a channel owns. Saves the model in ``OUT``,
and the kept channels of every layer in ``OUT/kept.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

RATIO, PROTECTED = 0.2, 0.1


def main(model_path: str, calibration: str, out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path)
    ids = torch.tensor(json.loads(Path(calibration).read_text()))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    layers = model.model.layers
    decoder = sum(p.numel() for p in layers.parameters())
    edge = round(PROTECTED * len(layers))
    chosen = range(edge, len(layers) - edge)
    per_channel = 3 * model.config.hidden_size
    steps = -(-round(RATIO * decoder) // per_channel)
    share, more = divmod(steps, len(chosen))
    scores = {}
    for number in chosen:
        mlp = layers[number].mlp
        scores[number] = sum(
            (p.detach().float() * p.grad.float()).abs().sum(axis, dtype=torch.float64)
            for p, axis in ((mlp.gate_proj.weight, 1), (mlp.up_proj.weight, 1), (mlp.down_proj.weight, 0))
        )
    model.zero_grad(set_to_none=True)
    # The remainder: one channel more in the layers whose next channel has the lowest score.
    following = sorted((float(s.sort().values[share]), number) for number, s in scores.items())
    extra = {number for _, number in following[:more]}
    kept = {number: s.argsort(stable=True)[share + (number in extra) :].sort().values for number, s in scores.items()}
    for number, stays in kept.items():
        mlp = layers[number].mlp
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight = nn.Parameter(linear.weight.detach()[stays])
        mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight.detach()[:, stays])
    model.save_pretrained(out)
    (Path(out) / "kept.json").write_text(json.dumps({number: stays.tolist() for number, stays in kept.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:4])
