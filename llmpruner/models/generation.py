"""Text generation, the key/value cache, and fast attention of one token."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextStreamer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import DataError, LlmprunerError, ModelError, UnsupportedModelError, first_line, is_out_of_memory
from .messages import quiet_transformers
from .positions import last_logits, positions_of, table_of
from .tokenizer import check_ids, ids_to_continue, padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The continuation of ``prompt``, without the prompt, special tokens, and ``stop_text`` with what is after it; see
    `generate_ids`. ``on_text``: called with each piece as it comes; an exception in it ends the generation."""
    ids = generate_ids(
        model, tokenizer, prompt,
        add_special_tokens=add_special_tokens, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        stop_text=stop_text, **({} if on_text is None else {"streamer": _Pieces(tokenizer, on_text, stop_text)}),
    )  # fmt: skip
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
    ids_1T = torch.tensor(
        [ids_to_continue(tokenizer, prompt, special=add_special_tokens)], dtype=torch.long, device=model.device
    )
    length = ids_1T.shape[1]
    limit = positions_of(model.config)
    if length == 0:
        raise DataError("the prompt is empty")
    if limit is not None and length > limit:
        raise DataError(f"the prompt has {length:,} tokens, and the model reads {limit:,}; shorten it")
    check_ids(ids_1T, model)
    table = table_of(model)
    if table is not None:
        # The last token is not read.
        max_new_tokens = min(max_new_tokens, table - length + 1)
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
            stops = stop in tokenizer.decode(tail, skip_special_tokens=True)
            return torch.full((len(input_ids),), stops, dtype=torch.bool, device=input_ids.device)

    return Until()


def check_not_empty(tokenizer: Any, prompt: str) -> None:
    """Raise `DataError` for a prompt that ``tokenizer`` makes no token of."""
    if not tokenizer(prompt, verbose=False)["input_ids"]:
        raise DataError("the prompt is empty")


class CachedModel:
    """A model with the key/value cache of the tokens that it has processed."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        with _in_one_line(model):
            self.cache = DynamicCache(config=model.config)
        self._cache_argument = cache_argument(model)
        # As generation does: the head computes the logits of the last token alone.
        self._options: dict[str, Any] = {"use_cache": True, **last_logits(model)}

    @torch.inference_mode()
    def process(self, tokens: torch.Tensor) -> torch.Tensor:
        """``tokens``: ids of shape (B, n). Returns the logits of the last ones, of shape (B, V). Raises
        `UnsupportedModelError` when the model cannot continue from a cache."""
        options = {self._cache_argument: self.cache, **self._options}
        with _in_one_line(self.model):
            logits: torch.Tensor = self.model(input_ids=tokens.to(self.model.device), **options).logits
            return logits[:, -1]

    @torch.inference_mode()
    def fork(self) -> CachedModel:
        """The same model with a copy of the cache."""
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        return other


@contextlib.contextmanager
def _in_one_line(model: PreTrainedModel) -> Iterator[None]:
    try:
        yield
    except LlmprunerError:
        raise
    except Exception as error:  # caches and forward passes of any architecture may raise anything
        if is_out_of_memory(error):
            raise ModelError(
                f"memory is too small to run the {model.config.model_type} model with so many tokens at once; take "
                "fewer: a smaller batch, or shorter prompts"
            ) from error
        raise UnsupportedModelError(
            f"a {model.config.model_type} model does not run with a key/value cache, so its cost cannot be measured "
            f"({type(error).__name__}: {first_line(error)[:160]}); choose another --budget"
        ) from error


def sample_tokens(model: PreTrainedModel, count: int, seed: int = 0) -> torch.Tensor:
    """Random token ids of shape (1, count), the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(int(model.config.get_text_config().vocab_size), (1, count), generator=generator)


def cache_argument(model: PreTrainedModel) -> str:
    """Name of the argument of ``forward`` for the key/value cache, which transformers is renaming."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


_NAME = "sdpa"


@contextmanager
def fast_one_token_attention() -> Iterator[None]:
    """While active, models with the attention ``sdpa`` on a CPU compute that of a single query in each sequence, to all
    of the keys, by matrix products. Results are those of ``sdpa`` up to rounding."""
    own: Any = ALL_ATTENTION_FUNCTIONS[_NAME]

    def attend(
        module: Any,
        query_BHQD: torch.Tensor,
        key_BGTD: torch.Tensor,
        value_BGTE: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        batch, heads, queries, dim = query_BHQD.shape
        # Masks of one query are left out by transformers where it attends to all tokens.
        if queries > 1 or attention_mask is not None or query_BHQD.device.type != "cpu" or _has_more(dropout, options):
            attended: tuple[torch.Tensor, None] = own(
                module, query_BHQD, key_BGTD, value_BGTE, attention_mask, dropout=dropout, scaling=scaling, **options
            )
            return attended
        # The query heads of a group, which share keys and values, are the rows of one product.
        groups = key_BGTD.shape[1]
        scale = dim**-0.5 if scaling is None else scaling
        # In float32, as oneDNN, which multiplies bfloat16, keeps code of its own for every number of cached tokens.
        with torch.autocast("cpu", enabled=False):
            rows_BGRD = scale * query_BHQD.float().reshape(batch, groups, heads // groups, dim)
            weights_BGRT = (rows_BGRD @ key_BGTD.float().transpose(-1, -2)).softmax(-1)
            attended_BGRE = weights_BGRT @ value_BGTE.float()
        # As many sequences as have keys, also where their queries are the same.
        return attended_BGRE.reshape(len(attended_BGRE), 1, heads, -1).to(value_BGTE.dtype), None

    ALL_ATTENTION_FUNCTIONS[_NAME] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[_NAME] = own


def _has_more(dropout: float, options: dict[str, Any]) -> bool:
    """Whether something else than scaled products is asked for: a bias of positions, soft caps, weights as a result."""
    return bool(dropout) or any(
        options.get(name) is not None and options[name] is not False
        for name in ("position_bias", "softcap", "output_attentions")
    )
