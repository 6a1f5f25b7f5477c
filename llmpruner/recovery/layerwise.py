"""Training decoder layers one after the other toward the outputs of the dense model's, see `LocalStrategy`.

Two streams of hidden states run through the decoder, h of the dense and ĥ of the pruned model, float32, in
micro-batches of examples that are padded on the right. For each layer, h is moved to after its target, the layer is
trained from ĥ (or from h, with ``inputs=dense``), and ĥ is moved through the trained layer. In memory are one layer of
either model and the optimizer state of one, beside what is outside of the layers.

After a layer, its weights and losses are in the folder of the job, from time to time the hidden states too. A run
that is continued moves the streams through finished layers from the last states that were written, with the same
results.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import get_scheduler

from ..calibration.chat import IGNORED
from ..engine.boundaries import copied
from ..engine.journal import Journal
from ..engine.walk import Batch, Call, call_layer, eager_experts, first_output, with_passed
from ..errors import ModelError, UnsupportedModelError
from ..models.weights import Weights
from .base import RecoveryJob, TrainingResult
from .example_walk import padded, walk_over
from .schedule import SCHEDULES, micro_batch, steps, warmup_steps

if TYPE_CHECKING:
    from ..engine.boundaries import States
    from ..engine.walk import ForwardWalk
    from ..settings import RecoverSettings


def train_layers(job: RecoveryJob, *, own_inputs: bool) -> TrainingResult:
    """Train the decoder layers of ``job.model`` in place. ``own_inputs``: from what the trained layers before give, not
    from the dense model's hidden states.

    Raises `ModelError` where the dense model is not known and for a loss that is not finite, and
    `UnsupportedModelError` for decoders whose layers cannot be run one by one, and models with different numbers of
    hidden channels.
    """
    return _Training(job, own_inputs=own_inputs).run()


def steps_by_layer(settings: RecoverSettings, examples: int, layers: int) -> list[int]:
    """The number of optimizer steps of every layer."""
    if settings.max_steps is None:
        return [steps(settings, examples)] * layers
    each, rest = divmod(settings.max_steps, layers)
    return [each + (number < rest) for number in range(layers)]


_JUDGED = 8
"""The fewest micro-batches over which the loss of a layer is compared before and after its training, of more."""


def used_examples(job: RecoveryJob) -> list[Mapping[str, list[int]]]:
    """The examples that are trained on: where the steps of a layer take fewer than there are, so many of them at
    random, the same ones for all layers. The streams of hidden states run over no others."""
    settings, rows = job.settings, list(job.examples)
    if settings.max_steps is None:
        return rows
    count = -(-settings.max_steps // job.graph.num_layers) * settings.batch_size
    if count >= len(rows):
        return rows
    return random.Random(f"{settings.seed} examples").sample(rows, count)


class _Training:
    """``dense``, ``pruned``: h and ĥ before the current layer; ``pruned`` is empty where inputs are those of the dense
    model."""

    def __init__(self, job: RecoveryJob, *, own_inputs: bool) -> None:
        self.job, self.own = job, own_inputs
        self.weights = job.walk.pruned or Weights(job.model, job.graph.layers)
        dense = job.walk.open_dense() if job.walk.open_dense else Weights(job.teacher(), job.graph.layers)
        size = micro_batch(job.settings)
        self.together = job.settings.batch_size // size
        """Micro-batches of a step."""
        # The longest first, so that memory that does not suffice shows at once.
        rows = sorted(used_examples(job), key=lambda row: -len(row["input_ids"]))
        parts = [rows[first : first + size] for first in range(0, len(rows), size)]
        ids = [padded([row["input_ids"] for row in part], 0) for part in parts]
        self.trained = [(padded([row["labels"] for row in part], IGNORED) != IGNORED)[:, 1:] for part in parts]
        self.counts = [int(trained.sum()) for trained in self.trained]
        self.walk, self.dense_walk = self._walk(self.weights, ids), self._walk(dense, ids)
        self.dense, self.pruned = self.dense_walk.embedded, self.walk.embedded
        if not self.own:
            self.pruned.clear()
        _check_widths(job, dense)
        layers = len(self.walk.layers)
        self.steps = steps_by_layer(job.settings, len(rows), layers)
        # The first dense layer after the target of each layer.
        numbers = job.layers or tuple(range(layers))
        self.ends = [*numbers[1:], len(self.dense_walk.layers)]
        self.journal = Journal(job.work_dir / "layers", {"examples": len(rows)})
        self.journal.check()
        self.done: list[dict[str, Any]] = []

    def _walk(self, weights: Weights, ids: Sequence[torch.Tensor]) -> ForwardWalk:
        streams = 2 if self.own else 1
        return walk_over(self.job, weights, ids, streams=streams, otherwise="use --strategy full, lora or distil")

    def run(self) -> TrainingResult:
        wanted = [number for number, count in enumerate(self.steps) if count]
        first = self._resume()
        for number in wanted[first:]:
            found = self.journal.load(f"layer-{number}")
            if found is None:
                found = self._layer(number)
            else:
                self.journal.use(number, self.weights)
                self._pass(number)
            self.done.append(found)
            states = {"dense": self.dense, "pruned": self.pruned} if self.own else {"dense": self.dense}
            # A continued run would lack what the layers have passed on, and passes the finished ones again.
            if not self.walk.passes_on:
                self.journal.layer_done({"layers": number + 1}, states)
        losses = tuple(loss for found in self.done for loss in found["losses"])
        trained = sum(p.numel() for number in wanted for p in self.walk.layers[number].parameters())
        kept = [{key: value for key, value in found.items() if key != "losses"} for found in self.done]
        return TrainingResult(self.job.model, losses, trained, _notes(kept), {"layers": kept})

    def _resume(self) -> int:
        """The number of layers that an interrupted run finished, and whose hidden states it kept."""
        found = self.journal.resume(self.weights)
        if found is None:
            return 0
        state, files = found
        self.dense, embedded = self.dense_walk.restored(files["dense"]), self.dense
        embedded.clear()
        if self.own:
            self.pruned, embedded = self.walk.restored(files["pruned"]), self.pruned
            embedded.clear()
        self.done = [self.journal.load(f"layer-{number}") for number in range(state["layers"])]
        return int(state["layers"])

    def _layer(self, number: int) -> dict[str, Any]:
        """Train a layer and move both streams to after it. Returns what is kept of it."""
        inputs, targets = self._streams(number)
        path, layer = f"{self.job.graph.layers}.{number}", self.walk.layers[number]
        with self.walk.layer(number):
            before = self._error(number, inputs, targets)
            original = [parameter.detach().clone() for parameter in layer.parameters()]
            with _trainable(layer) as parameters:
                losses = self._train(number, parameters, inputs, targets)
            after = self._error(number, inputs, targets)
            restored = not after < before
            if restored:
                after = before
                for parameter, value in zip(layer.parameters(), original, strict=True):
                    parameter.data = value
            self.journal.keep(number, self.weights, [f"{path}.{name}" for name, _ in layer.named_parameters()])
            if self.own:
                with torch.no_grad():
                    self.walk.advance(number, inputs)
        self.dense = targets
        record = {
            "layer": number, "dense_layer": self.ends[number] - 1, "before": before, "after": after,
            "restored": restored, "losses": losses,
        }  # fmt: skip
        self.journal.store(f"layer-{number}", record)
        return record

    def _pass(self, number: int) -> None:
        """Move both streams to after a layer that is trained already."""
        inputs, self.dense = self._streams(number)
        if self.own:
            with self.walk.layer(number), torch.no_grad():
                self.walk.advance(number, inputs)

    @torch.no_grad()
    def _streams(self, number: int) -> tuple[States, States]:
        """The inputs and the targets of a layer."""
        targets = self.dense
        if not self.own:
            targets = self.dense.beside()
            targets.extend(self.dense)
        for of in range(self.ends[number - 1] if number else 0, self.ends[number]):
            with self.dense_walk.layer(of):
                self.dense_walk.advance(of, targets)
        return self.pruned if self.own else self.dense, targets

    @torch.no_grad()
    def _error(self, number: int, inputs: States, targets: States) -> float:
        """The loss over all micro-batches, or where there are 16 or more, over every second to fourth of them."""
        total, positions = 0.0, range(0, len(self.counts), max(1, min(4, len(self.counts) // _JUDGED)))
        for position in positions:
            found = self.walk.run(number, self.walk.batches[position], inputs[position], inputs.passed, tried=True)
            total += float(_relative(found, targets[position], self.trained[position]).sum())
        return total / sum(self.counts[position] for position in positions)

    def _train(self, number: int, parameters: Sequence[nn.Parameter], inputs: States, targets: States) -> list[float]:
        """The loss of every step."""
        settings, count = self.job.settings, self.steps[number]
        optimizer = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=settings.weight_decay)
        schedule = get_scheduler(SCHEDULES[settings.schedule], optimizer, warmup_steps(settings, count), count)
        earlier, every = sum(self.steps[:number]), sum(self.steps)
        losses: list[float] = []
        for step, positions in enumerate(itertools.islice(self._batches(number), count), start=1):
            tokens, loss = sum(self.counts[position] for position in positions), 0.0
            for position in positions:
                found = self._forward(number, self.walk.batches[position], inputs[position], inputs)
                part = _relative(found, targets[position], self.trained[position]).sum() / tokens
                part.backward()  # type: ignore[no-untyped-call]
                loss += float(part.detach())
            if not math.isfinite(loss):
                raise ModelError(f"the loss of layer {number} became {loss} at step {step}; lower the learning rate")
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss)
            if self.job.on_step is not None:
                self.job.on_step(earlier + step, every, loss)
        return losses

    def _batches(self, number: int) -> Iterator[tuple[int, ...]]:
        """Micro-batches of one step after the other, without end; each pass over the data in an order of its own."""
        for epoch in itertools.count():
            order = list(range(len(self.counts)))
            random.Random(f"{self.job.settings.seed} {number} {epoch}").shuffle(order)
            for first in range(0, len(order), self.together):
                yield tuple(order[first : first + self.together])

    def _forward(self, number: int, batch: Batch, hidden: torch.Tensor, of: States) -> torch.Tensor:
        """As `ForwardWalk.run`, with gradients, and in float32 unless the settings say otherwise."""
        passed = copied(of.passed.get(batch.first, {}))
        call: Call = _in_float32(with_passed(batch.calls[number], passed))
        mixed = self.job.settings.autocast
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=mixed), eager_experts(self.walk.experts):
            return first_output(call_layer(self.walk.layers[number], hidden, call)).float()


def _check_widths(job: RecoveryJob, dense: Weights) -> None:
    pruned, whole = (m.get_input_embeddings().weight.shape[1] for m in (job.model, dense.model))
    if pruned != whole:
        raise UnsupportedModelError(
            f"the pruned model has {pruned} hidden channels and the dense one {whole}, so outputs of their layers "
            "cannot be compared; use --strategy full, lora or distil"
        )


def _relative(found: torch.Tensor, target: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    """‖found − target‖² / ‖target‖² of the positions before trained tokens, (N,) in float32."""
    wanted = trained.to(target.device)
    one, other = found[:, :-1][wanted], target[:, :-1][wanted]
    return (one - other).square().sum(-1) / other.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)


@contextlib.contextmanager
def _trainable(layer: nn.Module) -> Iterator[list[nn.Parameter]]:
    """While active, the parameters of a layer are in float32 and require gradients; then they are rounded to their
    dtype."""
    before = [(p, p.dtype, p.requires_grad) for p in layer.parameters() if p.is_floating_point()]
    for parameter, _, _ in before:
        # A copy, as values may be mapped from a file.
        parameter.data = parameter.data.to(torch.float32, copy=True)
        parameter.requires_grad_(True)
    try:
        yield [parameter for parameter, _, _ in before]
    finally:
        for parameter, dtype, required in before:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(required)


def _in_float32(value: Any) -> Any:
    """Arguments of a layer with tensors of 16 bits in float32, as kernels of attention want one dtype."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _in_float32(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_in_float32(item) for item in value)
    return value


def _notes(layers: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    before, after = ([found[key] for found in layers] for key in ("before", "after"))
    last = layers[-1]
    notes = [
        f"relative error of the layers' outputs: mean {sum(before) / len(before):.4f} → {sum(after) / len(after):.4f}, "
        f"layer {last['layer']} {last['before']:.4f} → {last['after']:.4f}; each layer's is in the record"
    ]
    restored = [str(found["layer"]) for found in layers if found["restored"]]
    if restored:
        notes.append(f"training did not lower the error of layers {', '.join(restored)}; they keep their weights")
    return tuple(notes)
