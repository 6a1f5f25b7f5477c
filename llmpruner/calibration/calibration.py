"""The text that importance and compensation read, as token ids, from one source or several. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from os.path import isfile
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..component import ComponentSettings
from ..errors import DataError, PluginError
from ..progress import QUIET, Progress
from .base import CalibrationSource, SampleTask
from .conversations import example, read_examples
from .documents import EXPECTED_EXAMPLES, check_source, parse_mixture, read_documents

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from ..engine.execution import Execution
    from ..engine.walk import CalibrationSet
    from ..models.model import Model, Structure


COMPARED = 2048
"""Tokens to compare a pruned model with: at least one sample, and no more samples than of calibration."""
LARGE = 250_000_000
"""Decoder parameters from which a default number of samples is two thirds, as each takes longer."""


class TextSource(CalibrationSource):
    """Windows of the documents in a file or a data set. Each begins with what the tokenizer puts before a text, mostly
    BOS: models trained with it compute unusual activations without it."""

    name = "text"
    summary = "a .txt, .json, .jsonl or .parquet file, or a data set (name, name:config or name:config:split)"

    def check(self, reference: str) -> None:
        check_source(reference)

    def sample(self, task: SampleTask) -> torch.Tensor:
        from .windows import windows

        return windows(read_documents(task.reference), task)


class ChatSource(CalibrationSource):
    """Instruction data in the model's chat format. Every sample begins with a whole conversation, further ones follow
    until it is full, and the last is cut; all are used before one is used again."""

    name = "chat"
    summary = "chat:FILE: conversations or instructions with answers, in the model's own chat format"

    def check(self, reference: str) -> None:
        if not reference:
            raise DataError("--calibration chat: name a file or data set with conversations, as chat:FILE")
        check_source(reference, example, EXPECTED_EXAMPLES)

    def sample(self, task: SampleTask) -> torch.Tensor:
        import torch

        from .chat import packed

        return torch.tensor(packed(read_examples(task.reference), task), dtype=torch.long)


class SelfWritten(CalibrationSource):
    name = "self"
    summary = "text that the model writes itself: passages and, of a chat model, answers; nothing is downloaded"
    writes = True

    class Settings(ComponentSettings):
        passage: int = Field(
            64, ge=2, le=16384, description="Maximum tokens per generated passage; samples are made of passages."
        )

    settings: Settings

    def check(self, reference: str) -> None:
        if reference:
            raise DataError(f"--calibration self:{reference}: the model writes this text, so nothing follows 'self'")

    def sample(self, task: SampleTask) -> torch.Tensor:
        from .written import written_samples

        return written_samples(task, self.settings.passage)


@dataclass(frozen=True)
class Part:
    """One source of a calibration text. ``reference``: as in `SampleTask`. ``share``: None where all are equal."""

    source: CalibrationSource
    reference: str
    share: float | None = None


@dataclass(frozen=True)
class CalibrationJob:
    """``text``: the value of ``--calibration``."""

    text: str
    parts: tuple[Part, ...]
    samples: int
    length: int
    fixed_length: bool = True
    """Whether the user asked for this length; a default is limited to the model's positions."""
    fixed_samples: bool = True
    """Whether the user asked for this number, or a plan; a default for fits is `samples_for` a model."""

    @property
    def writes(self) -> bool:
        return any(part.source.writes for part in self.parts)

    def record(self) -> dict[str, dict[str, Any]]:
        """Source name → settings as JSON values, for sources that have settings."""
        return {part.source.name: values for part in self.parts if (values := part.source.record())}

    def check(self) -> None:
        for part in self.parts:
            part.source.check(part.reference)

    def length_for(self, config: PreTrainedConfig) -> int:
        """Tokens per sample for a model with this configuration. Raises `DataError` for more than it has positions."""
        from ..models.generation import positions_of

        limit = positions_of(config) or self.length
        if self.length > limit and self.fixed_length:
            raise DataError(f"{self.length} tokens are beyond the model's {limit} positions; lower --set prune.length")
        return min(self.length, limit)

    def samples_for(self, structure: Structure) -> int:
        """Number of samples for a model."""
        is_large = structure.graph.decoder_parameters >= LARGE and not self.fixed_samples
        return max(len(self.parts), self.samples * 2 // 3) if is_large else self.samples

    def sample(self, model: Model, execution: Execution, seed: int) -> CalibrationSet:
        """The text. What the model writes alone has ``held_out`` samples, too: a few more take hardly any time, but a
        text of their own as many steps as all."""
        from ..engine.walk import CalibrationSet

        more = self.compared(model) if all(part.source.writes for part in self.parts) else 0
        samples = self.samples_for(model)
        ids = self._drawn("calibration", model, execution, samples + more, seed)
        return CalibrationSet(ids[:samples], self.text, ids[samples:] if more else None)

    def held_out(self, text: CalibrationSet, model: Model, execution: Execution, seed: int) -> torch.Tensor:
        """Samples like those of ``text``, with which nothing is scored or fitted, (samples, length)."""
        if text.held_out is not None:
            return text.held_out
        return self._drawn("comparison", model, execution, self.compared(model), seed + 1)

    def compared(self, structure: Structure) -> int:
        """Number of the samples of `held_out`."""
        return min(self.samples_for(structure), -(-COMPARED // self.length_for(structure.config)))

    def _drawn(self, name: str, model: Model, execution: Execution, samples: int, seed: int) -> torch.Tensor:
        """Samples, drawn, or kept as ``name`` by an interrupted run or by one with another ratio."""
        import torch

        from ..engine.journal import recalled

        def drawn() -> Any:
            execution.progress.status(f"The model writes its {name} text" if self.writes else f"Reading {self.text}")
            return self.draw(model, samples, seed, execution.progress).tolist()

        return torch.tensor(recalled(execution.shared, name, lambda: execution.ranks.from_first(drawn)))

    def draw(self, model: Model, samples: int, seed: int, progress: Progress = QUIET) -> torch.Tensor:
        """The first ``samples`` of the text, (samples, length). Raises as `length_for` and the sources do."""
        import torch

        from ..models.tokenizer import check_ids

        network, tokenizer = model.network, model.tokenizer
        length = self.length_for(network.config)
        order = self.order(max(samples, self.samples_for(model)))[:samples]
        rows: list[Iterator[torch.Tensor]] = []
        for number, part in enumerate(self.parts):
            # Equal parts are all of the size of the largest.
            needed = -(-samples // len(self.parts)) if part.share is None else max(1, order.count(number))
            task = SampleTask(network, tokenizer, part.reference, needed, length, seed, model.family, progress)
            ids = _sampled(part, task, model)
            if ids.dtype != torch.int64 or tuple(ids.shape) != (needed, length):
                facts, expected = f"{ids.dtype} of shape {tuple(ids.shape)}", f"torch.int64 of shape {(needed, length)}"
                raise PluginError(f"{part.source.label()} gave {facts}; expected {expected}")
            rows.append(iter(check_ids(ids.cpu(), network)))
        return torch.stack([next(rows[number]) for number in order])

    def order(self, samples: int | None = None) -> list[int]:
        """The number of the part of each sample: the one that is furthest behind its share. ``samples``: by default all
        of the text. Raises `DataError` where a part gets none."""
        shares = [1.0 if part.share is None else part.share for part in self.parts]
        taken = [0] * len(shares)
        order: list[int] = []
        for total in range(1, (samples or self.samples) + 1):
            behind = [total * share / sum(shares) - had for share, had in zip(shares, taken, strict=True)]
            order.append(behind.index(max(behind)))
            taken[order[-1]] += 1
        if 0 in taken:
            named = self.text.split(",")[taken.index(0)].strip()
            raise DataError(f"--samples {self.samples} gives '{named}' none by its share; raise --samples")
        return order


def _sampled(part: Part, task: SampleTask, model: Model) -> torch.Tensor:
    if part.source.writes:
        # Not where a model has tensors in float32 that are no parameters.
        with suppress(RuntimeError), model.weights.in_bfloat16():
            return part.source.sample(task)
    return part.source.sample(task)


def parse_calibration(
    text: str, sources: Mapping[str, type[CalibrationSource]], settings: Mapping[str, Mapping[str, Any]]
) -> tuple[Part, ...]:
    """The parts of the value of ``--calibration``: of a source that is named alone or before a colon, unless there is
    such a file; else text. ``settings``: source name → values. Raises `DataError` and `SettingsError`."""
    parts = []
    for reference, share in parse_mixture(text):
        name, _, rest = reference.partition(":")
        if name == TextSource.name or name not in sources or isfile(reference):
            name, rest = TextSource.name, reference
        parts.append(Part(sources[name](**settings.get(name, {})), rest, share))
    return tuple(parts)
