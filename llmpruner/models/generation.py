"""Text generation: greedy unless a temperature is given, with the key/value cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextStreamer

from ..errors import DataError
from .position_tables import table_of
from .positions import positions_of
from .quiet import quiet_transformers
from .tokens import ids_to_continue, tokens_of
from .vocabulary import check_ids, padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    *,
    add_special_tokens: bool = True,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    stop_text: str | None = None,
    note: Callable[[str], None] | None = None,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The continuation of ``prompt``, without the prompt, special tokens, and ``stop_text`` with what is after it; see
    `generate_ids`. ``note``: called with a predicate about the model, where the continuation reached the last of its
    positions. ``on_text``: called with each piece as it comes; an exception in it ends the generation."""
    ids = generate_ids(
        model, tokenizer, prompt,
        add_special_tokens=add_special_tokens, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        stop_text=stop_text, **({} if on_text is None else {"streamer": _Pieces(tokenizer, on_text, stop_text)}),
    )  # fmt: skip
    if note is not None:
        length = len(ids_to_continue(tokenizer, prompt, special=add_special_tokens))
        reached = _reached(model, length + len(ids), ended=len(ids) < max_new_tokens)
        if reached is not None:
            note(reached)
    return text_before(tokenizer.decode(ids, skip_special_tokens=True), stop_text).strip("\n")


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Calls ``on_text`` with the pieces of a continuation up to ``stop``. What may be the start of ``stop`` waits for
    the next piece."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None], stop: str | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text, self._stop = on_text, stop or ""
        self._waiting, self._stopped = "", False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._stopped:
            return
        text, found, _ = (self._waiting + text).partition(self._stop) if self._stop else (self._waiting + text, "", "")
        self._stopped = bool(found)
        starts = (self._stop[:size] for size in range(len(self._stop) - 1, 0, -1))
        part = "" if self._stopped or stream_end else next((start for start in starts if text.endswith(start)), "")
        self._waiting = part
        if len(text) > len(part):
            self._on_text(text[: len(text) - len(part)])


def _reached(model: PreTrainedModel, tokens: int, *, ended: bool) -> str | None:
    """A predicate about the model for a text of ``tokens`` tokens, the last of which is not read; None where the model
    has more positions. ``ended``: whether the text is shorter than asked for."""
    limit = positions_of(model.config)
    if limit is None or tokens <= limit:
        return None
    if table_of(model) is None:
        if tokens == limit + 1:
            return None
        return f"was trained with {limit:,} positions, and the answer goes beyond them"
    return f"reads at most {limit:,} tokens, and the answer ends there" if ended else None


def text_before(text: str, stop: str | None) -> str:
    """``text`` up to ``stop``, all of it where that is None or not in it."""
    return text.partition(stop)[0] if stop else text


def generate_ids(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    *,
    add_special_tokens: bool = True,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    stop_text: str | None = None,
    **options: Any,
) -> list[int]:
    """The tokens that continue ``prompt``.

    ``add_special_tokens``: False for a prompt that holds its special tokens already, as chat templates put them in.
    A ``temperature`` above 0 samples, reproducibly by ``seed``; the caller's random state is left as it was. Stops at
    the end-of-sequence token, once the continuation has ``stop_text``, which is then among the tokens, and where a
    model with a table of positions (GPT-2, OPT) has no more. ``options``: passed on to transformers (``streamer``,
    ``stopping_criteria``). Raises `DataError` for a prompt without tokens or with more than the model has positions, or
    a negative temperature.
    """
    if temperature < 0:
        raise DataError(f"temperature must be 0 (greedy) or above, got {temperature}")
    check_prompt(model.config, tokenizer, prompt)
    ids_1T = torch.tensor(
        [ids_to_continue(tokenizer, prompt, special=add_special_tokens)], dtype=torch.long, device=model.device
    )
    length = ids_1T.shape[1]
    _check_length(length)
    check_ids(ids_1T, model)
    limit = table_of(model)
    if limit is not None:
        if length > limit:
            raise _too_long(length, limit)
        # The last token is not read.
        max_new_tokens = min(max_new_tokens, limit - length + 1)
    own = model.generation_config
    stop = own.eos_token_id if own is not None and own.eos_token_id is not None else tokenizer.eos_token_id
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        use_cache=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop,
        pad_token_id=padding_id(tokenizer, model, stop if isinstance(stop, list) else [stop]),
        **(sampling or {"do_sample": False}),
    )
    if stop_text:
        criteria = options.get("stopping_criteria", ())
        options["stopping_criteria"] = StoppingCriteriaList([*criteria, _until_text(tokenizer, stop_text, length)])
    devices = [model.device] if model.device.type == "cuda" else []
    # transformers takes values that the call does not give from the model's own configuration, whose repetition penalty
    # and sampling settings would change the result.
    model.generation_config = config
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=devices), torch.inference_mode():
            torch.manual_seed(seed)
            output = model.generate(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), **options)
    finally:
        model.generation_config = own
    return [int(token) for token in output[0, length:]]


def _until_text(tokenizer: Any, stop: str, length: int) -> StoppingCriteria:
    """Ends a generation once what follows the first ``length`` tokens has ``stop``.

    That of transformers (``stop_strings``) goes over the whole vocabulary first, whose form it has to know.
    """
    # A token is a byte at least. Some tokenizers leave out a blank before the first token that they decode.
    width = len(stop.encode()) + 2

    class Until(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            tail = input_ids[0, max(length, input_ids.shape[1] - width) :]
            found = stop in tokenizer.decode(tail, skip_special_tokens=True)
            return torch.full((len(input_ids),), found, dtype=torch.bool, device=input_ids.device)

    return Until()


def check_prompt(config: PreTrainedConfig, tokenizer: Any, prompt: str) -> None:
    """Raise `DataError` for a prompt of more tokens than the model has positions for."""
    limit = positions_of(config)
    # A token is a byte at least.
    if limit is None or len(prompt.encode()) <= limit:
        return
    tokens = len(tokens_of(tokenizer, prompt))
    if tokens > limit:
        raise _too_long(tokens, limit)


def check_not_empty(tokenizer: Any, prompt: str) -> None:
    """Raise `DataError` for a prompt that ``tokenizer`` makes no token of."""
    _check_length(len(tokenizer(prompt, verbose=False)["input_ids"]))


def _check_length(length: int) -> None:
    if length == 0:
        raise DataError("the prompt is empty")


def _too_long(tokens: int, limit: int) -> DataError:
    return DataError(f"the prompt has {tokens:,} tokens, and the model reads {limit:,}; shorten it")
