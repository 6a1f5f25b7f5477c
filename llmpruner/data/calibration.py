"""Calibration: token sequences that importance and compensation are computed on, from one source or several."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import DataError, PluginError
from .source import CalibrationSource, SampleTask
from .text import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class CalibrationSet:
    """``input_ids``: int64, shape (samples, length), no padding. ``source``: what the user named it."""

    input_ids: torch.Tensor
    source: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the shape and the tokens, as hexadecimal digits."""
        digest = hashlib.sha256(repr(tuple(self.input_ids.shape)).encode())
        digest.update(self.input_ids.cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def first(self, tokens: int) -> CalibrationSet:
        """The first samples, of about ``tokens`` tokens in all; everything where there are fewer."""
        return CalibrationSet(self.input_ids[: max(1, tokens // self.input_ids.shape[1])], self.source)


@dataclass(frozen=True)
class Part:
    """One source of a calibration text, and what of it: a file or a data set, or what followed the source's name."""

    source: CalibrationSource
    reference: str


@dataclass(frozen=True)
class CalibrationText:
    """What ``--calibration`` names: ``text`` as the user wrote it; its ``parts``, which are mixed in equal shares."""

    text: str
    parts: tuple[Part, ...]

    @property
    def writes(self) -> bool:
        """Whether the model writes any part of it."""
        return any(part.source.writes for part in self.parts)

    def record(self) -> dict[str, dict[str, Any]]:
        """Source name → settings as JSON values, for sources that have settings."""
        return {part.source.name: values for part in self.parts if (values := part.source.record())}

    def check(self) -> None:
        """Raise `DataError` for what can be refused before a model is loaded."""
        for part in self.parts:
            part.source.check(part.reference)

    def sample(
        self, model: PreTrainedModel, tokenizer: Any | None, *, samples: int, length: int, seed: int
    ) -> CalibrationSet:
        """``samples`` sequences of ``length`` tokens, one of each part in turn.

        Raises `DataError` when a source is missing, malformed or too short, or when the model cannot read ``length``
        tokens, and `PluginError` when a source gives something else than such sequences.
        """
        if samples < 1 or length < 2:
            raise DataError(f"calibration needs at least 1 sample of 2 tokens, got {samples} × {length}")
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit and length > limit:
            raise DataError(f"calibration length {length} is beyond the model's {limit} positions; lower --length")
        count = len(self.parts)
        if count > samples:
            raise DataError(f"{samples} samples cannot be shared by {count} sources; raise --samples")
        shares = []
        for part in self.parts:
            share = SampleTask(model, tokenizer, part.reference, -(-samples // count), length, seed)
            shares.append(_checked(part.source.sample(share), share, part.source))
        return CalibrationSet(torch.stack(shares, 1).flatten(0, 1)[:samples], self.text)


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
    """What ``--calibration`` names: one part, or several with commas between them.

    A part that is an existing file is read as text. One that equals the name of a source, alone or before a colon,
    chooses that source. Any other is text: a file or the name of a data set. ``sources``: by name, among them the
    source of text; ``settings``: source name → values, for sources that were given any. Raises `DataError` for an empty
    part and `SettingsError` for settings that a source does not have. Nothing is read yet.
    """

    def part(reference: str) -> Part:
        name, _, rest = reference.partition(":")
        if name == TextSource.name or name not in sources or _is_file(reference):
            name, rest = TextSource.name, reference
        return Part(sources[name](**(settings or {}).get(name, {})), rest)

    if _is_file(text):
        return CalibrationText(text, (part(text),))
    references = [reference.strip() for reference in text.split(",")]
    if not all(references):
        raise DataError(f"--calibration '{text}' names an empty source; write them with one comma in between")
    return CalibrationText(text, tuple(map(part, references)))


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # too long for a name, or with a zero byte: the source of text says which
        return False
