"""Calibration: the token sequences for importance and compensation, from one or several sources."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import DataError, PluginError
from ..models.positions import positions_of
from ..progress import QUIET, Progress
from .documents import is_file
from .source import CalibrationSource, SampleTask
from .text import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


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
        return CalibrationSet(self.input_ids[: max(1, tokens // self.input_ids.shape[1])], self.source)


@dataclass(frozen=True)
class Part:
    """One source of a calibration text. ``reference``: a file or data set, or the text after ``NAME:``."""

    source: CalibrationSource
    reference: str


@dataclass(frozen=True)
class CalibrationText:
    """The parsed value of ``--calibration``. ``text``: the value; ``parts``: mixed in equal shares."""

    text: str
    parts: tuple[Part, ...]

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

    def sample(
        self,
        model: PreTrainedModel,
        tokenizer: Any | None,
        *,
        samples: int,
        length: int,
        seed: int,
        progress: Progress = QUIET,
    ) -> CalibrationSet:
        """``samples`` sequences of ``length`` tokens, taken from the parts in turn.

        Raises `DataError` when a source is missing, malformed or too short, or ``length`` is beyond the model's
        positions, and `PluginError` when a source returns another shape or dtype.
        """
        if samples < 1 or length < 2:
            raise DataError(f"calibration needs at least 1 sample of 2 tokens, got {samples} × {length}")
        check_length(model.config, length)
        count = len(self.parts)
        if count > samples:
            raise DataError(f"{samples} samples cannot be shared by {count} sources; raise --samples")
        shares = []
        for part in self.parts:
            share = SampleTask(model, tokenizer, part.reference, -(-samples // count), length, seed, progress)
            shares.append(_checked(part.source.sample(share), share, part.source))
        return CalibrationSet(torch.stack(shares, 1).flatten(0, 1)[:samples], self.text)


def check_length(config: PreTrainedConfig, length: int) -> None:
    """Raise `DataError` for samples of more tokens than the model has positions for."""
    limit = positions_of(config)
    if limit is not None and length > limit:
        raise DataError(f"calibration length {length} is beyond the model's {limit} positions; lower --length")


def _checked(ids: torch.Tensor, task: SampleTask, source: CalibrationSource) -> torch.Tensor:
    wanted = task.samples, task.length
    if ids.dtype != torch.int64 or tuple(ids.shape) != wanted:
        raise PluginError(
            f"{source.label()} gave {ids.dtype} of shape {tuple(ids.shape)}; expected torch.int64 of shape {wanted}"
        )
    return ids.cpu()


def parse_calibration(
    text: str,
    sources: Mapping[str, type[CalibrationSource]],
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> CalibrationText:
    """Parse the value of ``--calibration``: one part, or several with commas between them.

    A part that is an existing file is text. A part that is the name of a source, alone or before a colon, selects that
    source. Any other is text: a file or the name of a data set. ``sources``: by name, including that of text;
    ``settings``: source name → values. Raises `DataError` for an empty part and `SettingsError` for settings that a
    source does not have. Reads no text.
    """

    def part(reference: str) -> Part:
        name, _, rest = reference.partition(":")
        if name == TextSource.name or name not in sources or is_file(reference):
            name, rest = TextSource.name, reference
        return Part(sources[name](**(settings or {}).get(name, {})), rest)

    if is_file(text):
        return CalibrationText(text, (part(text),))
    references = [reference.strip() for reference in text.split(",")]
    if not all(references):
        raise DataError(f"--calibration '{text}' names an empty source; write them with one comma in between")
    return CalibrationText(text, tuple(map(part, references)))
