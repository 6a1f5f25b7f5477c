"""Text that the model generates: passages from nothing, and answers to instructions and other prompts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from itertools import cycle, takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch.quasirandom import SobolEngine
from transformers import GenerationConfig, PreTrainedModel

from ..errors import DataError, ModelError, UnsupportedModelError, first_line
from ..models.generation import cached_bytes, fast_one_token_attention, generating_as, table_of
from ..models.messages import quiet_transformers
from ..models.numbers import with_fast_products
from ..models.tokenizer import ids_to_continue, padding_id
from ..progress import QUIET, Progress
from .chat import chat_prompt, filled, has_chat_format, texts_at, token_ids
from .conversations import Instruction
from .windows import opening_tokens

if TYPE_CHECKING:
    from ..models.family import ModelFamily
    from .base import SampleTask


ANSWER_TOKENS = 96
"""The most tokens of an answer in a calibration text."""
_SENTENCE_ENDS = (". ", "! ", "? ", ".\n", "!\n", "?\n", "\n\n")


def written_samples(task: SampleTask, passage: int) -> torch.Tensor:
    """Passages, (samples, length); of a model with a chat format, which writes little prose from nothing, answers to
    instructions in every second sample."""
    model, tokenizer, family, length = task.model, task.tokenizer, task.family, task.length
    answers = length >= 2 * ANSWER_TOKENS and has_chat_format(family, tokenizer)
    is_chat_B = (torch.arange(task.samples) % 2 == 1) & answers
    chats = int(is_chat_B.sum())
    ids_BT = torch.empty(task.samples, length, dtype=torch.long)
    if chats:  # first, as they may be refused, by the template or for the positions
        # An instruction with its answer takes some 112 tokens. Where all take fewer, they are used again.
        needed = chats * -(-length // 112)
        examples = answers_to_instructions(model, tokenizer, family, needed, ANSWER_TOKENS, task.seed, task.progress)
        if not examples:
            raise DataError("--calibration self: the model answers nothing but blanks; give a file")
        texts = [token_ids(text, tokenizer) for each in examples for text in texts_at("self", each, family, tokenizer)]
        ids_BT[is_chat_B] = torch.tensor(filled(cycle(texts), chats, length))
    ids_BT[~is_chat_B] = self_generated(
        model, tokenizer, task.samples - chats, length, task.seed, passage=passage, as_texts=True,
        progress=task.progress,
    )  # fmt: skip
    return ids_BT


def self_generated(
    model: PreTrainedModel,
    tokenizer: Any | None,
    samples: int,
    length: int,
    seed: int,
    *,
    passage: int = 64,
    as_texts: bool = False,
    progress: Progress = QUIET,
    label: str = "Writing calibration text",
) -> torch.Tensor:
    """Text sampled from the model, int64 (samples, length) on the CPU: passages of at most ``passage`` tokens from BOS,
    joined until a sample is full, as many short ones cover more subjects than a few long ones. The random numbers of a
    passage are one scrambled Sobol point (Owen, 1998), so that frequencies of first tokens are close to their
    probabilities. The first token is drawn at temperature 4, as some chat models have not learned how a text begins
    (SmolLM2-Instruct: a third of them with a hyphen), the others at 1 without truncation.

    ``as_texts``: samples begin with what the tokenizer puts before a text; where that is nothing, every second one with
    BOS, the others in the middle of a passage: the first token of a sequence, whichever it is, has values in the
    residual stream that are hundreds of times as large as others' (Sun et al., 2024, "Massive Activations in Large
    Language Models"), and layers that are fitted on BOS alone there do not give other tokens these values.

    Raises `ModelError` when the model's logits are NaN, and `UnsupportedModelError` for a class that cannot generate.
    """
    bos = _first_token(model, tokenizer)
    parts = -(-length // passage)
    tokens, passages = -(-length // parts), samples * parts
    batch = batch_of(passages, passages_at_once(model.config, tokens, model.dtype.itemsize))
    eos = getattr(model.generation_config, "eos_token_id", None)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=tokens - 1, eos_token_id=eos, pad_token_id=bos, bos_token_id=bos
    )

    @torch.no_grad()
    def write() -> list[torch.Tensor]:
        points = SobolEngine(tokens - 1, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
        written: list[torch.Tensor] = []
        # The cache of keys and values grows with the batch.
        for done in progress.track(range(0, passages, batch), label):
            rows = min(batch, passages - done)
            # The end of a sequence is never drawn: padding after it would distort the statistics.
            never = [eos] if isinstance(eos, int) else eos or []
            draw = _Draw(points.draw(rows).to(model.device), never, opening=4.0)
            start = torch.full((rows, 1), bos, dtype=torch.long, device=model.device)
            with generating_as(model, config), fast_one_token_attention(), _naming_failures(model):
                ids = model.generate(start, attention_mask=torch.ones_like(start), logits_processor=[draw])
            written.append(ids.cpu())
        return written

    ids_BT = torch.cat(with_fast_products(model, write)).view(samples, -1)
    if as_texts:
        # Any text shows what the tokenizer puts before it.
        opening = opening_tokens(tokenizer, "0") if tokenizer is not None else []
        if not opening:
            ids_BT[1::2] = ids_BT[1::2].roll(-(tokens // 2), 1)
        elif opening != [bos]:
            ids_BT = torch.cat([ids_BT.new_tensor(opening).expand(samples, -1), ids_BT], 1)
    return ids_BT[:, :length]


def answered(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    numbers: torch.Tensor | None = None,
) -> list[list[int]]:
    """At most ``tokens`` tokens after each prompt (ids), without the end: the likeliest, or drawn at temperature 1 by
    ``numbers`` (prompts, tokens) between 0 and 1. Raises `ModelError` when the model's logits are NaN."""
    eos = getattr(model.generation_config, "eos_token_id", None)
    stops = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    pad = padding_id(tokenizer, model, sorted(stops))
    length, device = max(map(len, prompts)), model.device
    ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in prompts], device=device)
    draw = [] if numbers is None else [_Draw(numbers.to(device), first=length)]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=tokens, eos_token_id=sorted(stops) or None, pad_token_id=pad
    )
    fast = fast_one_token_attention()
    with quiet_transformers(), torch.no_grad(), generating_as(model, config), fast, _naming_failures(model):
        run = partial(model.generate, ids, attention_mask=mask, logits_processor=draw)
        written = with_fast_products(model, run)[:, length:].tolist()
    return [list(takewhile(lambda token: token not in stops, row)) for row in written]


def answers_to_instructions(
    model: PreTrainedModel, tokenizer: Any, family: ModelFamily, count: int, tokens: int, seed: int,
    progress: Progress = QUIET,
) -> list[Instruction]:  # fmt: skip
    """``count`` answers of at most ``tokens`` to the instructions of ``instructions.txt`` in random order, all of them
    before one is used again; fewer where answers are blank. Raises `DataError` for a model with too few positions."""
    prompts: dict[str, list[int]] = {}
    for instruction in (files(__package__) / "instructions.txt").read_text(encoding="utf-8").splitlines():
        prompt = chat_prompt(family, tokenizer, instruction)
        prompts[instruction] = ids_to_continue(tokenizer, prompt.text, special=not prompt.has_special_tokens)
    needed, positions = max(map(len, prompts.values())) + tokens, table_of(model.config)
    if positions is not None and needed > positions:
        room = f"instructions with answers take {needed} tokens, and the model has {positions:,} positions"
        raise DataError(f"{room}; give a file instead of self, or self-text to recover")
    instructions, rng = list(prompts), random.Random(seed)
    rng.shuffle(instructions)
    # In a batch, prompts have the length of the longest.
    chosen = sorted((instructions[n % len(instructions)] for n in range(count)), key=lambda i: len(prompts[i]))
    points = SobolEngine(tokens, scramble=True, seed=seed).draw(count)  # type: ignore[no-untyped-call]
    size = batch_of(count, passages_at_once(model.config, needed, model.dtype.itemsize))
    written: list[Instruction] = []
    for first in progress.track(range(0, count, size), "The model answers instructions"):
        batch, numbers = chosen[first : first + size], points[first : first + size]
        drawn = answered(model, tokenizer, [prompts[each] for each in batch], tokens, numbers)
        for instruction, ids in zip(batch, drawn, strict=True):
            if answer := text_of(tokenizer, ids, finished=len(ids) < tokens, stop=family.chat_format.stop_text):
                written.append(Instruction(instruction, answer))
    rng.shuffle(written)
    return written


def text_of(tokenizer: Any, ids: Sequence[int], *, finished: bool, stop: str | None = None) -> str:
    """The text of ``ids``; unless ``finished``, up to its last sentence, as a model learns where rows end."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    if stop and stop in text:
        text, finished = text.partition(stop)[0], True
    text = text.strip()
    end = 0 if finished else max(text.rfind(mark) for mark in _SENTENCE_ENDS)
    return text[: end + 1].strip() if end > 0 else text


def passages_at_once(config: Any, tokens: int, item: int) -> int:
    """64 to 256, up to 1 GiB of keys and values, of ``item`` bytes, and four copies of the logits."""
    each = tokens * cached_bytes(config, item) + 16 * int(config.get_text_config().vocab_size)
    return max(64, min(256, (1 << 30) // each))


def batch_of(count: int, most: int) -> int:
    """The size of batches of at most ``most`` that ``count`` are divided into equally."""
    return -(-count // -(-count // most)) if count else 1


@contextmanager
def _naming_failures(model: PreTrainedModel) -> Iterator[None]:
    """For classes that transformers cannot generate with (Blenderbot, whose cache is of another kind)."""
    try:
        yield
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        cannot = f"{type(model).__name__} cannot generate text ({type(error).__name__}: {first_line(error)[:160]})"
        raise UnsupportedModelError(f"{cannot}; give a text with --calibration, or --data of recover") from error


class _Draw:
    """A logits processor that draws a token in each row and sets all other logits to −∞: where the cumulative
    probability exceeds the step's number. ``numbers``: (rows, steps) in [0, 1]. ``opening``: temperature of the first
    token."""

    def __init__(self, numbers: torch.Tensor, never: Sequence[int] = (), first: int = 1, opening: float = 1.0) -> None:
        self._numbers, self._never, self._first, self._opening = numbers, list(never), first, opening

    def __call__(self, ids: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        vocabulary, step = logits_BV.shape[-1], ids.shape[1] - self._first
        if step == 0:
            logits_BV /= self._opening
        never = torch.tensor([t for t in self._never if t < vocabulary], dtype=torch.long, device=logits_BV.device)
        # A few rows at a time stay in the processor's caches.
        parts = zip(torch.split(logits_BV, 8), torch.split(self._numbers[:, step : step + 1], 8), strict=True)
        tokens = [self._tokens(logits.float(), numbers, never) for logits, numbers in parts]
        # In place: new memory of this size would take longer than the draw.
        return logits_BV.fill_(-torch.inf).scatter_(-1, torch.cat(tokens), 0.0)

    def _tokens(self, logits_NV: torch.Tensor, numbers_R1: torch.Tensor, never: torch.Tensor) -> torch.Tensor:
        upto_NV = logits_NV.index_fill(-1, never, -torch.inf).softmax(-1).cumsum(-1)
        total_N1 = upto_NV[:, -1:]
        if bool(total_N1.isnan().any()):
            raise ModelError("the model's logits are not numbers, so it cannot write text; its weights are damaged")
        drawn_N1 = numbers_R1 * total_N1
        # Below the total, which rounding may reach, and after equal sums, so that no token of probability 0 is drawn.
        drawn_N1 = drawn_N1.minimum(total_N1.nextafter(torch.zeros_like(total_N1)))
        return torch.searchsorted(upto_NV, drawn_N1, right=True)


def _first_token(model: PreTrainedModel, tokenizer: Any | None) -> int:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for owner in (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer):
        for name in ("bos_token_id", "decoder_start_token_id", "eos_token_id"):
            value = getattr(owner, name, None)
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int) and 0 <= value < vocabulary:
                return value
    return 0
