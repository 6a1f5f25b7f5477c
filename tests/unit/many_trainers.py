"""Trains small models in all processes of a launcher, or in one: ``python many_trainers.py FOLDER COMMAND…``.

Every process writes what it has at the end to ``FOLDER/CASE-RANK.pt``, and then runs the command line of llmpruner with
``COMMAND…``.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tiny_models
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from llmpruner_llama.family import LlamaFamily
from torch.distributed.tensor import DTensor

from llmpruner.calibration.chat import TrainingText, Turn
from llmpruner.cli import main
from llmpruner.discovery.groups import build_graph
from llmpruner.engine.ranks import Ranks
from llmpruner.recovery.base import RecoveryStrategy
from llmpruner.recovery.best import BestWeights
from llmpruner.recovery.distil import DistilStrategy
from llmpruner.recovery.examples import Examples
from llmpruner.recovery.full import FullStrategy
from llmpruner.recovery.lora import LoraStrategy
from llmpruner.recovery.run import recover
from llmpruner.recovery.sharded import make_whole
from llmpruner.recovery.training_data import prepare
from llmpruner.settings import RecoverSettings

SETTINGS = RecoverSettings(
    data="here", batch_size=4, micro_batch_size=1, max_steps=6, learning_rate=5e-3, warmup_steps=0, cutoff=48,
    validation=5, eval_steps=2, loss_on="answers",
)  # fmt: skip
STRATEGIES: dict[str, RecoveryStrategy] = {
    "full": FullStrategy(),
    "lora": LoraStrategy(dropout=0.0),
    "distil": DistilStrategy(),
    "kept targets": DistilStrategy(top=9),
}
EXAMPLES = Examples(
    tuple(TrainingText((Turn(f"Question {n}:\n", "It is so. " * (n % 4 + 1)),)) for n in range(21)), "here"
)


def trained(
    folder: Path, strategy: RecoveryStrategy, *, dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, Any]:
    model, tokenizer, family = tiny_models.llama().to(dtype), tiny_models.tokenizer(), LlamaFamily()
    data = prepare(SETTINGS, family, tokenizer, EXAMPLES)
    found = recover(
        model, tokenizer, build_graph(family, model.config), data, strategy, SETTINGS, folder,
        load_teacher=lambda: tiny_models.llama(seed=4), **options,
    )  # fmt: skip
    return {
        "losses": found.losses, "validation": [one.loss for one in found.validation],
        "weights": found.model.state_dict(),
    }  # fmt: skip


def continued(folder: Path) -> dict[str, Any]:
    """A run that was interrupted at step 5, and continued."""

    def interrupt(step: int, *_: object) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        trained(folder, FullStrategy(), on_step=interrupt)
    steps: list[int] = []
    found = trained(folder, FullStrategy(), on_step=lambda step, *_: steps.append(step))
    assert steps[0] > 1 and len(steps) < 6
    return found


def sharded(folder: Path) -> dict[str, Any]:
    """Two steps of a model that `fully_shard` spread over the processes; its best weights; and the whole model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ranks = Ranks.current()
    model = tiny_models.llama(tied=True)
    if ranks.count > 1:
        mesh = init_device_mesh("cpu", (ranks.count,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.arange(2, 42).view(2, 20)
    best = BestWeights(folder)
    folder.mkdir(exist_ok=True)
    ranks.wait()
    for step in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            best.keep(model, 1)
    make_whole(model)
    last = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(input_ids=ids).logits.detach()
    best.restore(model, 1)
    return {
        "weights": last, "best": model.state_dict(), "logits": logits, "class": type(model).__name__,
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "plain": all(type(p) is torch.nn.Parameter for p in model.parameters()),
    }  # fmt: skip


@contextlib.contextmanager
def fsdp() -> Iterator[None]:
    """A block in which accelerate uses FSDP2, which it does with GPUs alone: only that choice is overridden."""
    settings = {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    }  # fmt: skip
    own = Accelerator.__init__

    def chosen(self: Accelerator, *arguments: Any, **options: Any) -> None:
        own(self, *arguments, **options)
        vars(self.state).update(distributed_type=DistributedType.FSDP, fsdp_plugin=FullyShardedDataParallelPlugin())

    spread: list[bool] = []

    def whole(model: torch.nn.Module) -> None:
        spread.append(any(isinstance(parameter, DTensor) for parameter in model.parameters()))
        make_whole(model)

    with (
        patch.dict(os.environ, settings),
        patch.object(Accelerator, "__init__", chosen),
        patch("llmpruner.recovery.training.make_whole", whole),
    ):
        yield
    assert spread and all(spread)


def run(place: Path) -> None:
    rank = os.environ.get("RANK", "0")
    cases = {name: lambda f, s=strategy: trained(f, s) for name, strategy in STRATEGIES.items()}
    cases["bfloat16"] = lambda f: trained(f, FullStrategy(), dtype=torch.bfloat16)
    for case, make in {**cases, "continued": continued, "sharded": sharded}.items():
        torch.save(make(place / f"{case} work"), place / f"{case}-{rank}.pt")
    if Ranks.current().count > 1:
        with fsdp():
            for case, make in {**{n: cases[n] for n in ("full", "lora", "bfloat16")}, "continued": continued}.items():
                torch.save(make(place / f"fsdp {case} work"), place / f"fsdp {case}-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
    # The process ends with the command, as `python -m llmpruner` does.
    sys.argv = ["llmpruner", *sys.argv[2:]]
    main()
