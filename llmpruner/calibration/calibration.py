"""Calibration: the token sequences for importance and compensation, from one or several sources. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os.path import isfile
from typing import TYPE_CHECKING, Any

from ..errors import DataError, PluginError
from ..progress import QUIET, Progress
from .documents import parse_mixture
from .sources import CalibrationSource, SampleTask, TextSource

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from ..engine.execution import Execution
    from ..models.model import Model


@dataclass(frozen=True)
class CalibrationSet:
    """``input_ids``: int64, shape (samples, length), without padding. ``source``: the value of ``--calibration``."""

    input_ids: torch.Tensor
    source: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the shape and the tokens, as hexadecimal digits."""
        digest = hashlib.sha256(repr(tuple(self.input_ids.shape)).encode())
        digest.update(self.input_ids.cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def first(self, tokens: int) -> CalibrationSet:
        """The first samples, with at most ``tokens`` tokens in all, but at least one sample."""
        count = max(1, tokens // self.input_ids.shape[1])
        return CalibrationSet(self.input_ids[:count], self.source)


@dataclass(frozen=True)
class Part:
    """One source of a calibration text. ``reference``: a file or data set, or the text after ``NAME:``. ``share``: how
    many of the samples are of this source in proportion to the others; None where all have equal parts."""

    source: CalibrationSource
    reference: str
    share: float | None = None


@dataclass(frozen=True)
class CalibrationJob:
    """The calibration text to read or to let the model write. ``text``: the value of ``--calibration``; ``parts``:
    mixed by their shares; ``samples``: how many; ``length``: tokens of each."""

    text: str
    parts: tuple[Part, ...]
    samples: int
    length: int
    fixed_length: bool = True
    """Whether the user asked for this length; a default is limited to the model's positions."""

    @property
    def writes(self) -> bool:
        """Whether any part is text that the model writes."""
        return any(part.source.writes for part in self.parts)

    def record(self) -> dict[str, dict[str, Any]]:
        """Source name → settings as JSON values, for sources that have settings."""
        return {part.source.name: values for part in self.parts if (values := part.source.record())}

    def check(self) -> None:
        """Raise `DataError` for errors that can be found before a model is loaded."""
        for part in self.parts:
            part.source.check(part.reference)

    def length_for(self, config: PreTrainedConfig) -> int:
        """Tokens per sample for a model with this configuration. Raises `DataError` for more than it has positions."""
        from ..models.generation import positions_of

        limit = positions_of(config) or self.length
        if self.length > limit and self.fixed_length:
            raise DataError(
                f"calibration length {self.length} is beyond the model's {limit} positions; lower --set prune.length"
            )
        return min(self.length, limit)

    def sample(self, name: str, model: Model, execution: Execution, samples: int, seed: int) -> CalibrationSet:
        """``samples`` of the text, in the shares that all have, read or written by the model; or those that an
        interrupted run, or one with another ratio, kept as ``name``."""
        import torch

        from ..engine.journal import recalled

        def drawn() -> Any:
            execution.progress.status(f"The model writes its {name} text" if self.writes else f"Reading {self.text}")
            return self.draw(model, samples, seed, execution.progress).tolist()

        ids = recalled(execution.shared, name, lambda: execution.ranks.from_first(drawn))
        return CalibrationSet(torch.tensor(ids), self.text)

    def draw(self, model: Model, samples: int, seed: int, progress: Progress = QUIET) -> torch.Tensor:
        """``samples`` of the text, at most all, taken from the parts in turn, from those with larger shares more often.

        Raises `DataError` when a source is missing, malformed or too short, or samples are longer than the model's
        positions, and `PluginError` when a source returns another shape or dtype.
        """
        import torch

        from ..models.tokenizer import check_ids

        network, tokenizer = model.model, model.tokenizer
        length = self.length_for(network.config)
        order = self.order()[:samples]
        rows: list[Iterator[torch.Tensor]] = []
        for number, part in enumerate(self.parts):
            # Equal parts are all of the size of the largest.
            needed = -(-samples // len(self.parts)) if part.share is None else max(1, order.count(number))
            task = SampleTask(network, tokenizer, part.reference, needed, length, seed, model.family, progress)
            ids = part.source.sample(task)
            if ids.dtype != torch.int64 or tuple(ids.shape) != (needed, length):
                raise PluginError(
                    f"{part.source.label()} gave {ids.dtype} of shape {tuple(ids.shape)}; expected torch.int64 of "
                    f"shape {(needed, length)}"
                )
            rows.append(iter(check_ids(ids.cpu(), network)))
        return torch.stack([next(rows[number]) for number in order])

    def order(self) -> list[int]:
        """The number of the part of each sample: always the one that is furthest behind its share, the first of those
        that are alike. Raises `DataError` where samples are too few for every part to have one."""
        shares = [1.0 if part.share is None else part.share for part in self.parts]
        taken = [0] * len(shares)
        order: list[int] = []
        for total in range(1, self.samples + 1):
            behind = [total * share / sum(shares) - had for share, had in zip(shares, taken, strict=True)]
            order.append(behind.index(max(behind)))
            taken[order[-1]] += 1
        if 0 in taken:
            named = self.text.split(",")[taken.index(0)].strip()
            raise DataError(f"--samples {self.samples} gives '{named}' none by its share; raise --samples")
        return order


def parse_calibration(
    text: str,
    sources: Mapping[str, type[CalibrationSource]],
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Part, ...]:
    """The parts of the value of ``--calibration``, see `llmpruner.calibration.documents`. Reads no text.

    A part that is the name of a source, alone or before a colon, selects that source, unless there is such a file. Any
    other is text: a file or the name of a data set. ``settings``: source name → values. Raises `DataError` for an empty
    part and `SettingsError` for settings that a source does not have.
    """
    parts = []
    for reference, share in parse_mixture(text):
        name, _, rest = reference.partition(":")
        if name == TextSource.name or name not in sources or isfile(reference):
            name, rest = TextSource.name, reference
        parts.append(Part(sources[name](**(settings or {}).get(name, {})), rest, share))
    return tuple(parts)
