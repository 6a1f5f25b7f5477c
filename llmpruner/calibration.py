"""Calibration: a handful of token sequences that importance is measured on.

Nothing has to be downloaded: by default the model writes its own text.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DataError, MissingExtraError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SELF = "self"
_TEXT_FIELDS = ("text", "page", "content")
_CHARACTERS_PER_TOKEN = 12
_ATTEMPTS = 200
_WINDOWS_PER_PIECE = 8
_BETWEEN = "\n\n"
_PASSAGE, _ROWS = 64, 128
"""What a model writes: tokens in one go, and passages at once."""


@dataclass(frozen=True)
class CalibrationSet:
    """``input_ids``: int64, shape (samples, length), no padding. ``fingerprint``: SHA-256 over its bytes."""

    input_ids: torch.Tensor
    source: str

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(tuple(self.input_ids.shape)).encode())
        digest.update(self.input_ids.cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def first(self, tokens: int) -> CalibrationSet:
        """The first samples, of about ``tokens`` tokens in all; everything where there are fewer."""
        return CalibrationSet(self.input_ids[: max(1, tokens // self.input_ids.shape[1])], self.source)


def calibration_set(
    source: str, model: PreTrainedModel, tokenizer: Any | None, *, samples: int, length: int, seed: int
) -> CalibrationSet:
    """``samples`` sequences of ``length`` tokens from ``self``, a ``.txt`` / ``.jsonl`` / ``.json`` file, or a
    datasets name (``name``, ``name:config`` or ``name:config:split``). Several with commas between them are mixed in
    equal parts, one sequence of each in turn.

    Raises `DataError` when a source is missing, malformed, or too short.
    """
    import torch

    if samples < 1 or length < 2:
        raise DataError(f"calibration needs at least 1 sample of 2 tokens, got {samples} × {length}")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and length > limit:
        raise DataError(f"calibration length {length} is beyond the model's {limit} positions; lower --length")
    parts = sources_of(source)
    if len(parts) > samples:
        raise DataError(f"{samples} samples cannot be shared by {len(parts)} sources; raise --samples")
    shares = [_from_one(part, model, tokenizer, -(-samples // len(parts)), length, seed) for part in parts]
    return CalibrationSet(torch.stack(shares, 1).flatten(0, 1)[:samples], source)


def sources_of(source: str) -> list[str]:
    """The parts of a mixture; a file whose name has commas is one source."""
    if Path(source).is_file():
        return [source]
    parts = [part.strip() for part in source.split(",")]
    if not all(parts):
        raise DataError(f"--calibration '{source}' names an empty source; write them with one comma in between")
    return parts


def _from_one(
    source: str, model: PreTrainedModel, tokenizer: Any | None, samples: int, length: int, seed: int
) -> torch.Tensor:
    if source == SELF:
        return self_generated(model, tokenizer, samples, length, seed)
    if tokenizer is None:
        raise ModelError(f"the model brings no tokenizer, so it cannot be calibrated on '{source}'; use 'self'")
    return _windows(read_documents(source), tokenizer, samples, length, seed, source)


def self_generated(model: PreTrainedModel, tokenizer: Any | None, samples: int, length: int, seed: int) -> torch.Tensor:
    """Text sampled from the model itself: passages of at most 64 tokens from BOS, at temperature 1, without truncation
    of the distribution, one after another until a sample is full. Many short passages are about more than a few long
    ones of as many tokens, and sooner written.

    Every passage is a fair sample. The numbers that choose its tokens are one scrambled Sobol point (Owen, 1998), a
    coordinate for each token, so that together passages begin with every token about as often as the model predicts.

    Returns int64 of shape (samples, length). Deterministic in ``seed``; torch's global generator is not used.
    """
    import torch
    from transformers import GenerationConfig

    from .walk import computes_bfloat16_fast

    bos = _first_token(model, tokenizer)
    parts = -(-length // _PASSAGE)
    passage, passages = -(-length // parts), samples * parts
    eos = getattr(model.generation_config, "eos_token_id", None)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=passage - 1, eos_token_id=eos, pad_token_id=bos, bos_token_id=bos
    )
    points = torch.quasirandom.SobolEngine(passage - 1, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    written: list[torch.Tensor] = []
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=computes_bfloat16_fast(model)):
        # The cache of keys and values grows with the batch.
        for done in range(0, passages, _ROWS):
            rows = min(_ROWS, passages - done)
            # Every sequence has full length: padding would dilute the statistics.
            draw = _Draw(points.draw(rows).to(model.device), never=[eos] if isinstance(eos, int) else eos or [])
            start = torch.full((rows, 1), bos, dtype=torch.long, device=model.device)
            mask = torch.ones_like(start)
            ids = model.generate(start, attention_mask=mask, generation_config=config, logits_processor=[draw])
            written.append(ids.cpu())
    return torch.cat(written).view(samples, -1)[:, :length]


class _Draw:
    """A logits processor that draws a token from each row and leaves nothing else to choose, by the numbers between 0
    and 1 that stand in ``numbers`` (rows, steps): one for each token. The tokens ``never`` are not drawn."""

    def __init__(self, numbers: torch.Tensor, never: Sequence[int] = ()) -> None:
        self._numbers, self._never = numbers, list(never)

    def __call__(self, ids: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        import torch

        vocabulary, step = logits_BV.shape[-1], ids.shape[1] - 1
        never = torch.tensor([t for t in self._never if t < vocabulary], dtype=torch.long, device=logits_BV.device)
        upto_BV = logits_BV.float().index_fill(-1, never, -torch.inf).softmax(-1).cumsum(-1)
        total_B1 = upto_BV[:, -1:]
        if bool(total_B1.isnan().any()):
            raise ModelError(
                "the model's logits are not numbers, so it cannot write calibration text; its weights are damaged"
            )
        drawn_B1 = self._numbers[:, step : step + 1] * total_B1
        # Below the total, which rounding may reach, and to the right of equal sums: what cannot follow is never drawn.
        drawn_B1 = drawn_B1.minimum(total_B1.nextafter(torch.zeros_like(total_B1)))
        tokens_B1 = torch.searchsorted(upto_BV, drawn_B1, right=True)
        return torch.full_like(logits_BV, -torch.inf).scatter_(-1, tokens_B1, 0.0)


def _first_token(model: PreTrainedModel, tokenizer: Any | None) -> int:
    generation = getattr(model, "generation_config", None)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for owner in (generation, model.config.get_text_config(), tokenizer):
        for name in ("bos_token_id", "decoder_start_token_id", "eos_token_id"):
            value = getattr(owner, name, None)
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int) and 0 <= value < vocabulary:
                return value
    return 0


def read_documents(source: str) -> list[str]:
    """The non-empty documents of a text source; see `calibration_set`."""
    path = Path(source)
    if path.is_file():
        documents = _read_file(path)
    elif path.suffix.lower() in (".txt", ".json", ".jsonl"):
        raise DataError(f"file '{source}' does not exist")
    else:
        documents = _read_dataset(source)
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise DataError(f"'{source}' holds no text")
    return documents


def _read_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read '{path}' as UTF-8 text: {error}") from error
    if path.suffix.lower() == ".jsonl":
        return [_text_of(line, f"{path}, line {n}") for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if path.suffix.lower() == ".json":
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise DataError(f"'{path}' is not valid JSON: {error}") from error
        if not isinstance(rows, list):
            raise DataError(f"'{path}' must hold a list of rows")
        return [_field_of(row, f"{path}, row {n}") for n, row in enumerate(rows, 1)]
    return [text]


def _text_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON: {error}") from error
    return _field_of(row, where)


def _field_of(row: Any, where: str) -> str:
    if isinstance(row, str):
        return row
    for name in _TEXT_FIELDS:
        if isinstance(row, dict) and isinstance(row.get(name), str):
            return str(row[name])
    raise DataError(f"{where}: expected an object with one of the fields {', '.join(_TEXT_FIELDS)}")


def _read_dataset(source: str) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "recover") from error
    name, config, split = [*source.split(":"), None, None][:3]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"'{source}' is neither a file nor a data set that can be loaded: {reason}") from error
    return [_field_of(row, f"{source}, row {n}") for n, row in enumerate(rows)]


def _windows(documents: list[str], tokenizer: Any, samples: int, length: int, seed: int, source: str) -> torch.Tensor:
    """Windows in random order that do not overlap, as widely spread as possible; where the text has too few of them,
    the rest are drawn anywhere in it. Documents follow one another in random order, so that short ones count too."""
    import torch

    rng = random.Random(seed)
    text = _BETWEEN.join(rng.sample(documents, len(documents)))
    rounds: list[list[list[int]]] = []
    for piece in _pieces(text, length * _CHARACTERS_PER_TOKEN * _WINDOWS_PER_PIECE, rng)[:samples]:
        ids = _tokens(tokenizer, piece)
        starts = [number * length for number in range(len(ids) // length)]
        rng.shuffle(starts)
        for turn, start in enumerate(starts):
            if turn == len(rounds):
                rounds.append([])
            rounds[turn].append(ids[start : start + length])
    rows = [row for later in rounds for row in later][:samples]
    rows += _anywhere(text, tokenizer, samples - len(rows), length, rng)
    if len(rows) < samples:
        raise DataError(
            f"'{source}' is too short for {samples} samples of {length} tokens; lower --samples or --length"
        )
    return torch.tensor(rows, dtype=torch.long)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _pieces(text: str, size: int, rng: random.Random) -> list[str]:
    """The text in pieces of about ``size`` characters that begin with a word, in random order."""
    found: list[str] = []
    start, stop = 0, rng.randrange(1, size + 1) if len(text) > size else size
    while start < len(text):
        while stop < len(text) and not text[stop - 1].isspace():
            stop += 1
        found.append(text[start:stop])
        start, stop = stop, stop + size
    rng.shuffle(found)
    return found


def _anywhere(text: str, tokenizer: Any, samples: int, length: int, rng: random.Random) -> list[list[int]]:
    """The first ``length`` tokens from random places."""
    span = length * _CHARACTERS_PER_TOKEN
    rows: list[list[int]] = []
    for _ in range(samples * _ATTEMPTS):
        if len(rows) == samples:
            break
        start = rng.randrange(max(1, len(text) - span + 1))
        while 0 < start < len(text) and not text[start - 1].isspace():
            start += 1
        ids = _tokens(tokenizer, text[start : start + span])[:length]
        if len(ids) == length:
            rows.append(ids)
    return rows
