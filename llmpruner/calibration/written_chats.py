"""Conversations that the model writes, both sides of them, in its own chat format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import DataError, ModelError
from ..models.generation import text_before
from ..models.positions import table_of
from ..models.tokenizer import ids_to_continue
from ..progress import QUIET, Progress
from .chat import Prompt, chat_frame, chat_prompt, training_texts
from .chat_source import packed, tokens_of
from .conversations import Instruction
from .written import answered

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..discovery.family import ModelFamily

QUESTION_TOKENS, ANSWER_TOKENS = 48, 128
"""The most tokens of a question and of its answer."""
WRITTEN_TOKENS = (QUESTION_TOKENS + ANSWER_TOKENS) // 2
"""So many of both are counted on, as most end earlier."""


def written_chats(
    model: PreTrainedModel,
    tokenizer: Any,
    family: ModelFamily,
    samples: int,
    length: int,
    seed: int,
    *,
    batch: int = 64,
    progress: Progress = QUIET,
) -> torch.Tensor:
    """Samples that begin with a conversation of one question and its answer, followed by further ones: int64 of shape
    (samples, length), on the CPU.

    The model gets what its format puts before a user's message, writes the question (Magpie, Xu et al., 2024), and then
    its answer, at temperature 1, without truncation of the distribution. ``batch``: conversations that are written at
    once. Deterministic in ``seed``. Raises `ModelError` for a model without a chat format, and when its logits are NaN;
    `DataError` where the chat template fails, and where what the format puts around a question and its answer would be
    half of a sample or more.
    """
    frame = chat_frame(family, tokenizer)
    if frame is None or model.config.is_encoder_decoder:
        raise ModelError(
            "the model has no chat format, or one that changes messages, so it cannot write conversations; leave "
            "self.chats out"
        )
    before, after = _ids(tokenizer, frame.before), tokenizer(frame.after, add_special_tokens=False)["input_ids"]
    around = len(before) + len(after)
    if 2 * around >= length:
        raise DataError(
            f"conversations need samples of more than {2 * around} tokens, as {around} are of the chat format; raise "
            "--length, or leave self.chats out"
        )
    points = torch.quasirandom.SobolEngine(QUESTION_TOKENS + ANSWER_TOKENS, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    end, chats = frame.after.strip(), list[list[int]]()
    limit = table_of(model)
    # A third of the positions that the format leaves, for a question.
    asked = QUESTION_TOKENS if limit is None else min(QUESTION_TOKENS, (limit - around) // 3)

    def write(count: int) -> None:
        for first in progress.track(range(0, count, batch), "Writing conversations"):
            numbers = points.draw(min(batch, count - first))
            written = answered(model, tokenizer, [before] * len(numbers), numbers[:, :asked])
            # Where the end of a message is text, not a token at which generation stops, the model writes it, and goes
            # on.
            questions = [_text(tokenizer, ids, end) for ids in written]
            prompts = [_ids(tokenizer, chat_prompt(family, tokenizer, question)) for question in questions]
            room = ANSWER_TOKENS if limit is None else max(1, min(ANSWER_TOKENS, limit - max(map(len, prompts))))
            answers = answered(model, tokenizer, prompts, numbers[:, QUESTION_TOKENS : QUESTION_TOKENS + room])
            for question, ids in zip(questions, answers, strict=True):
                example = Instruction(question, _text(tokenizer, ids, family.stop_text))
                chats.extend(tokens_of(tokenizer, text) for text in training_texts(example, family, tokenizer))

    write(-(-samples * length // (around + WRITTEN_TOKENS)))
    short = length - sum(map(len, chats))
    if short > 0:
        # Of few samples, where conversations are shorter than what is counted on.
        write(-(-short // max(around, 1)))
    return torch.tensor(packed(chats, samples, length, seed, "self.chats"), dtype=torch.long)


def _ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    return ids_to_continue(tokenizer, prompt.text, special=not prompt.has_special_tokens)


def _text(tokenizer: Any, ids: list[int], end: str | None) -> str:
    """Of ``ids``, up to ``end``."""
    return text_before(tokenizer.decode(ids, skip_special_tokens=True), end).strip()
