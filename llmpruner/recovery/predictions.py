"""What the dense model predicts on the rows of a distillation: read in one pass before it, and kept in files, so that
one model is in memory while training, and later epochs and a resumed training do not run the dense one.

Of each trained token, the `TOP` likeliest tokens are kept with their probabilities, and `DRAWN` of the rest by
systematic sampling: each stands for an equal part of the rest's mass, in expectation for its own probability. So the
divergence computed from them, and its gradient, are right in expectation, which the likeliest tokens alone are not:
they teach a model to be too sure (Anshumann et al., Sparse Logit Sampling, ACL 2025, arXiv 2503.16870).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence

from ..calibration.chat import IGNORED
from ..engine.boundaries import Boundaries, States
from ..engine.execution import TOKENS_AT_ONCE, Execution
from ..engine.ranks import Ranks
from ..engine.walk import CalibrationSet, Call, ForwardWalk, as_output, check_layers, record, replaced_layers
from ..files import check_space, writing
from ..models.model import Model
from ..models.numbers import with_fast_products
from ..models.tokenizer import predicted_tokens
from ..models.vocabulary import InTokens
from ..progress import Progress
from ..values import bytes_text, counted

Row = Mapping[str, list[int]]  # as in base.py, which names `Predictions`
TOP, DRAWN = 32, 96
"""Of tokens, for each trained one: the likeliest, whose probabilities are exact, and the draws from the rest."""
STORED = torch.float16  # of probabilities
_SHARD = 64
"""Rows of a file, after which a pass that was killed goes on."""
_LOGITS = 1 << 26  # computed at once: 256 MiB in float32
_ELEMENTS = 1 << 22  # the same, of those that are compressed
_STREAMED_TOKENS = 1 << 18
"""Read together by a streamed model: so many take longer to compute than a layer takes to be read, and the hidden
states of a model of 8B take 4 GiB of disk."""

Batch = Mapping[str, torch.Tensor]


class Kept(NamedTuple):
    """Of N tokens, as in the files: the ids of the likeliest tokens and of those drawn, int32; the probabilities of the
    likeliest; of each token float32, the probability of all others, and the sum of p log p in nats."""

    tokens_NC: torch.Tensor
    top_NK: torch.Tensor
    rest_N: torch.Tensor
    information_N: torch.Tensor


class Predicted(NamedTuple):
    """Of N tokens, on one device. The weights, float32, sum to 1; a token may be there twice."""

    tokens_NC: torch.Tensor
    weights_NC: torch.Tensor
    information_N: torch.Tensor


class Predictions:
    """Those for ``rows``, in files in ``folder``. ``about``: all else that they depend on, as JSON values."""

    def __init__(self, rows: Sequence[Row], seed: int, folder: Path, about: object) -> None:
        # Batches are shuffled and split, so a row is found by what it holds; equal ones share predictions.
        unique = {_key(row["input_ids"], row["labels"]): row for row in rows}
        self._numbers = {key: number for number, key in enumerate(unique)}
        self._rows, self._seed = list(unique.values()), seed
        labels = [torch.tensor(row["labels"][1:]) for row in self._rows]
        self._trained = [(each != IGNORED).nonzero()[:, 0] for each in labels]
        identity = json.dumps([about, seed, TOP, DRAWN, str(STORED), [key.hex() for key in unique]])
        name = f"predictions-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
        self._shards = [range(len(unique))[n : n + _SHARD] for n in range(0, len(unique), _SHARD)]
        self._files = [folder / f"{name}-{number}.safetensors" for number in range(len(self._shards))]

    def of(self, batch: Batch) -> Predicted:
        """For the trained tokens of a padded batch, row by row, on its device."""
        device, parts = batch["input_ids"].device, []
        for ids, labels, mask in zip(*(batch[n].cpu() for n in ("input_ids", "labels", "attention_mask")), strict=True):
            number = self._numbers[_key(ids[mask == 1].tolist(), labels[mask == 1].tolist())]
            start = sum(map(len, self._trained[number - number % _SHARD : number]))
            place = slice(start, start + len(self._trained[number]))
            with safe_open(self._files[number // _SHARD], "pt") as file:
                parts.append(Kept(*(file.get_slice(name)[place] for name in Kept._fields)))
        with torch.autocast(device.type, enabled=False):  # which cannot join float16
            tokens, top, rest, information = (torch.cat(each).to(device) for each in zip(*parts, strict=True))
        drawn = tokens.shape[1] - top.shape[1]
        weights = torch.cat([top.float(), (rest / max(drawn, 1))[:, None].expand(-1, drawn)], 1)
        return Predicted(tokens.long(), weights / weights.sum(1, keepdim=True), information)

    @torch.no_grad()
    def make(self, open_dense: Callable[[], tuple[Model, Any]], ranks: Ranks, progress: Progress) -> None:
        """Write the files that are not there, spread over the processes. ``open_dense``: the dense model, in memory or
        streamed, and its network in the tokens of the rows. Raises `OutputError` where the disk has too little room."""
        missing = ranks.from_first(lambda: [n for n, file in enumerate(self._files) if not file.is_file()])
        if missing:
            tokens = sum(len(self._trained[row]) for shard in missing for row in self._shards[shard])
            size, what = tokens * (4 * (TOP + DRAWN) + STORED.itemsize * TOP + 8), "the dense model's predictions"
            ranks.from_first(lambda: check_space(self._files[0], size, what))
            where = f"in '{self._files[0].parent}' until the end"
            progress.status(f"keeping {what} of {counted(tokens, 'token')} {where}: {bytes_text(size)}")
        if mine := ranks.mine(missing):
            with progress.bar("The dense model reads the examples") as at:
                self._write(mine, *open_dense(), lambda share: at(share, "The dense model reads the examples"))
        ranks.wait()

    def _write(self, shards: Sequence[int], dense: Model, network: Any, at: Callable[[float], object]) -> None:
        size = min(TOKENS_AT_ONCE, _LOGITS // predicted_tokens(dense.network))
        batches = [(shard, rows) for shard in shards for rows in self._batches(shard, size)]
        kept: dict[int, Kept] = {}
        padded, folder = [self._padded(rows) for _, rows in batches], self._files[0].parent
        read = _logits(dense, network, padded, folder, at)
        for (shard, rows), logits_BTV in zip(batches, read, strict=True):
            for row, logits_TV in zip(rows, logits_BTV, strict=True):
                draw = random.Random(f"{self._seed} predictions {row}")
                uniform_N = torch.tensor([draw.random() for _ in self._trained[row]])
                kept[row] = compressed(logits_TV, self._trained[row], uniform_N)
            if all(row in kept for row in self._shards[shard]):
                of_rows = zip(*(kept.pop(row) for row in self._shards[shard]), strict=True)
                file, values = self._files[shard], (torch.cat(each) for each in of_rows)
                with writing(file):
                    save_file(dict(zip(Kept._fields, values, strict=True)), file.with_suffix(".partial"))
                    file.with_suffix(".partial").replace(file)

    def _batches(self, shard: int, size: int) -> Iterator[list[int]]:
        """The rows of a shard by length, in lists of at least one and at most ``size`` tokens when padded."""
        rows: list[int] = []
        for row in sorted(self._shards[shard], key=lambda row: len(self._rows[row]["input_ids"])):
            if rows and (len(rows) + 1) * len(self._rows[row]["input_ids"]) > size:
                yield rows
                rows = []
            rows.append(row)
        yield rows

    def _padded(self, rows: Sequence[int]) -> Batch:
        """Rows padded on the right, where no position before it sees the padding."""
        ids = [torch.tensor(self._rows[row]["input_ids"]) for row in rows]
        mask_BT = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
        return {"input_ids": pad_sequence(ids, batch_first=True), "attention_mask": mask_BT}


def _key(ids: list[int], labels: list[int]) -> bytes:
    return hashlib.sha256(repr((ids, labels)).encode()).digest()


def compressed(logits_TV: torch.Tensor, places_N: torch.Tensor, uniform_N: torch.Tensor) -> Kept:
    """What is kept of the predictions at some places of a row, on the CPU. ``uniform_N``: numbers from 0 to 1."""
    vocabulary = logits_TV.shape[1]
    top, parts = min(TOP, vocabulary), []
    drawn = torch.arange(DRAWN if top < vocabulary else 0, device=logits_TV.device)
    size = max(1, _ELEMENTS // vocabulary)
    for places, uniform in zip(torch.split(places_N, size), torch.split(uniform_N, size), strict=True):
        p_NV = logits_TV[places.to(logits_TV.device)].float().softmax(-1)
        information = torch.xlogy(p_NV, p_NV).sum(-1)
        likeliest, tokens = p_NV.topk(top)
        up_to = p_NV.scatter_(1, tokens, 0.0).cumsum(-1)
        rest = up_to[:, -1]
        # Equally spaced from a random start: they vary less than as many that are drawn one by one.
        points = (uniform.to(rest.device)[:, None] + drawn) / DRAWN * rest[:, None]
        others = torch.searchsorted(up_to, points, right=True).clamp_max_(vocabulary - 1)
        of_part = torch.cat([tokens, others], 1).int(), likeliest.to(STORED), rest, information
        parts.append([each.cpu() for each in of_part])
    return Kept(*map(torch.cat, zip(*parts, strict=True)))


def _logits(
    dense: Model, network: Any, batches: Sequence[Batch], folder: Path, at: Callable[[float], object]
) -> Iterator[torch.Tensor]:
    """The logits of each batch, (B, T, V). ``folder``: for hidden states of a streamed model."""
    if dense.streamed is None:
        for number, batch in enumerate(batches):
            at(number / len(batches))
            yield _run(dense, network, batch)
        return
    part: list[Batch] = []
    for number, batch in enumerate(batches, start=1):
        part.append(batch)
        if number == len(batches) or sum(each["input_ids"].numel() for each in part) > _STREAMED_TOKENS:
            done, share = (number - len(part)) / len(batches), len(part) / len(batches)
            yield from _streamed(dense, network, part, folder, partial(_at_part, at, done, share))
            part = []


def _at_part(at: Callable[[float], object], done: float, share: float, of_part: float) -> None:
    at(done + share * of_part)


def _streamed(
    dense: Model, network: Any, batches: Sequence[Batch], folder: Path, at: Callable[[float], object]
) -> Iterator[torch.Tensor]:
    """The same, of a model whose layers are read one by one: each runs on all batches."""
    weights, execution = dense.weights, Execution(dense.weights)
    layers, states = execution.layers, States(Boundaries(folder))
    calls: list[list[Call]] = []
    with weights.outside():
        ids = batches[-1]["input_ids"][-1:]
        own = network.old[ids.to(network.device)] if isinstance(network, InTokens) else ids
        form = check_layers(execution, CalibrationSet(own, "examples"))
        for batch in batches:
            inputs = _inputs(network, batch)
            run: Any = partial(network, attention_mask=inputs["attention_mask"])
            of_batch, hidden = record(run, layers, inputs["input_ids"], form.tuples)
            calls.append(of_batch)
            states.append(hidden.float())
    walk = ForwardWalk(execution, layers, form, range(len(batches)), calls)
    for number in range(len(layers)):
        at(number / len(layers))
        with weights.layer(number):
            walk.advance(number, states)
    with weights.outside():
        for batch, hidden in zip(batches, states, strict=True):
            computed = as_output(hidden.to(execution.model.dtype), form.tuples[-1])
            with replaced_layers(layers, lambda *_, computed=computed, **__: computed):
                yield _run(dense, network, batch)


def _run(dense: Model, network: Any, batch: Batch) -> torch.Tensor:
    inputs = _inputs(network, batch)
    logits: torch.Tensor = with_fast_products(dense.network, lambda: network(**inputs).logits)
    return logits


def _inputs(network: Any, batch: Batch) -> dict[str, Any]:
    """On the device of a network whose weights are there. A mask of padding on the right changes no prediction before
    it, and would be kept for each layer of a streamed model; only `InTokens` needs it, to tell where a row ends."""
    mask = batch["attention_mask"] if isinstance(network, InTokens) else torch.ones_like(batch["input_ids"])
    ids = batch["input_ids"].to(network.device)
    return {"input_ids": ids, "attention_mask": mask.to(network.device), "use_cache": False}
