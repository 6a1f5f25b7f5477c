"""First-order Taylor importance as a textbook writes it: the whole model in memory, one backward pass by autograd.

    python -m benchmarks.textbook MODEL CALIBRATION PLAN

``CALIBRATION``: JSON list of token ids, (samples, length). Writes the kept MLP channels of every layer to ``PLAN``:
those with the largest Σ|g·w| over the weights that a channel owns, with the same number of channels in each of the
layers that are not protected.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

RATIO, PROTECTED = 0.2, 0.1


def main(model_path: str, calibration: str, plan: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path)
    ids = torch.tensor(json.loads(Path(calibration).read_text()))
    for row in ids.split(1):
        loss = model(input_ids=row, labels=row, use_cache=False).loss / len(ids)
        loss.backward()
    layers = model.model.layers
    decoder = sum(p.numel() for p in layers.parameters())
    edge = round(PROTECTED * len(layers))
    chosen = range(edge, len(layers) - edge)
    per_channel = 3 * model.config.hidden_size
    steps = round(RATIO * decoder) // per_channel
    share, more = divmod(steps, len(chosen))
    scores = {}
    for number in chosen:
        mlp = layers[number].mlp
        scores[number] = sum(
            (p.detach().float() * p.grad.float()).abs().sum(axis, dtype=torch.float64)
            for p, axis in ((mlp.gate_proj.weight, 1), (mlp.up_proj.weight, 1), (mlp.down_proj.weight, 0))
        )
    # The remainder: one channel more in the layers whose next channel has the lowest score.
    following = sorted((float(s.sort().values[share]), number) for number, s in scores.items())
    extra = {number for _, number in following[:more]}
    kept = {
        number: sorted(s.argsort(stable=True)[share + (number in extra) :].tolist()) for number, s in scores.items()
    }
    Path(plan).write_text(json.dumps(kept))


if __name__ == "__main__":
    main(*sys.argv[1:4])
