"""Running a model on tokens: how many it reads, logits of some positions, generation, and the key/value cache."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel, TextStreamer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import DataError, LlmprunerError, ModelError, UnsupportedModelError, first_line, is_out_of_memory
from .devices import CPU
from .messages import quiet_transformers
from .tokenizer import check_ids, ids_to_continue, padding_id

_LOG = logging.getLogger("llmpruner")

LOGIT_ELEMENTS = 1 << 24
"""Logits that are computed at once, if the model can: 64 MiB in float32."""


def positions_of(config: PreTrainedConfig) -> int | None:
    """The number of positions of the text model; None where its configuration sets no limit."""
    text = config.get_text_config()
    # The second name is MPT's.
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def table_of(config: PreTrainedConfig) -> int | None:
    """The positions of a model that looks them up in a table (GPT-2, OPT), and reads no more; None for a rotary one."""
    return None if getattr(config.get_text_config(), "rope_parameters", None) else positions_of(config)


def check_table(config: PreTrainedConfig, tokens: int, what: str, advice: str, ref: str) -> None:
    """Raise `DataError` for more ``tokens`` than a table has positions. ``what``: names them."""
    if (limit := table_of(config)) is not None and tokens > limit:
        raise DataError(f"{what} are beyond the {limit:,} positions of {ref}; {advice}")


def warn_beyond(config: PreTrainedConfig, tokens: int, what: str, advice: str, ref: str) -> None:
    """Warn of more tokens than a rotary model was trained with: it predicts worse there."""
    if (limit := positions_of(config)) is not None and tokens > limit:
        _LOG.warning("%s are beyond the %s positions that %s was trained with; %s", what, f"{limit:,}", ref, advice)


def computes_some_logits(model: PreTrainedModel) -> bool:
    """Whether the model's forward takes ``logits_to_keep``, as nearly all of transformers' do."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def logits_at(model: PreTrainedModel, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits (B, n, V) of token ids (B, T) at ``positions`` (n,), int64; no others are computed if the model can."""
    some = {"logits_to_keep": positions} if computes_some_logits(model) else {}
    logits: torch.Tensor = model(input_ids=input_ids, use_cache=False, **some).logits
    return logits if some else logits.index_select(1, positions)


def position_blocks(model: PreTrainedModel, input_ids: torch.Tensor, vocabulary: int) -> list[torch.Tensor]:
    """Positions 0 to T - 2 of token ids (B, T), in blocks of at most `LOGIT_ELEMENTS` logits if the model can."""
    samples, length = input_ids.shape
    positions = torch.arange(length - 1, device=input_ids.device)
    if not computes_some_logits(model):
        return [positions]
    return list(torch.split(positions, max(1, LOGIT_ELEMENTS // (samples * vocabulary))))


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
    """The continuation of ``prompt``, without special tokens, up to ``stop_text`` or the model's last position.

    ``add_special_tokens``: False for a prompt that has them, as chat templates do. ``temperature``: above 0, tokens are
    drawn by ``seed``, and the caller's random state stays. ``on_text``: called with each piece; an exception in it ends
    the generation. Raises `DataError` for a prompt that is longer than the model's positions.
    """
    ids = ids_to_continue(tokenizer, prompt, special=add_special_tokens)
    ids_1T = check_ids(torch.tensor([ids], dtype=torch.long, device=model.device), model)
    limit, table = positions_of(model.config), table_of(model.config)
    if limit is not None and len(ids) > limit:
        raise DataError(f"the prompt has {len(ids):,} tokens, and the model reads {limit:,}; shorten it")
    if table is not None:
        max_new_tokens = min(max_new_tokens, table - len(ids) + 1)  # the last token is not read
    stated = getattr(model.generation_config, "eos_token_id", None)
    end = tokenizer.eos_token_id if stated is None else stated
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        pad_token_id=padding_id(tokenizer, model, end if isinstance(end, list) else [end]),
        do_sample=temperature > 0,
        stop_strings=stop_text,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
    )
    streamer = None if on_text is None else _Pieces(tokenizer, on_text, stop_text)
    kept = torch.random.fork_rng([] if model.device == CPU else [model.device], device_type=model.device.type)
    with quiet_transformers(), kept, torch.inference_mode(), generating_as(model, config):
        torch.manual_seed(seed)
        mask = torch.ones_like(ids_1T)
        output = model.generate(input_ids=ids_1T, attention_mask=mask, streamer=streamer, tokenizer=tokenizer)
    text = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    return text_before(text, stop_text).strip("\n")


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Calls ``on_text`` with the pieces of a continuation up to ``stop``; what may be the start of ``stop`` waits."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None], stop: str | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text, self._stop = on_text, stop
        self._text, self._shown = "", 0

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._text += text
        final = text_before(self._text, self._stop)
        if self._stop and final == self._text and not stream_end:
            final = final[: max(0, len(final) - len(self._stop) + 1)]
        if len(final) > self._shown:
            self._on_text(final[self._shown :])
            self._shown = len(final)


def text_before(text: str, stop: str | None) -> str:
    """``text`` up to ``stop``; all of it where there is none."""
    return text.partition(stop)[0] if stop else text


@contextmanager
def generating_as(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Generate by ``config`` alone. From the configuration of a model, transformers would take what ``config`` leaves
    open: a repetition penalty (Qwen2.5-Instruct) or a forced end (BART) changes the probabilities of tokens."""
    stated = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = stated


class CachedModel:
    """A model with the key/value cache of the tokens that it has processed."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        with _in_one_line(model):
            self.cache = DynamicCache(config=model.config)
        some = {"logits_to_keep": 1} if computes_some_logits(model) else {}
        self._options: dict[str, Any] = {"cache": self.cache, "use_cache": True, **some}

    @torch.inference_mode()
    def process(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits (B, V) of the last of ``tokens``, ids (B, n). Raises `UnsupportedModelError` if a cache fails."""
        with _in_one_line(self.model):
            logits: torch.Tensor = self.model(input_ids=tokens.to(self.model.device), **self._options).logits
            return logits[:, -1]


@contextmanager
def _in_one_line(model: PreTrainedModel) -> Iterator[None]:
    try:
        yield
    except LlmprunerError:
        raise
    except Exception as error:  # caches and forward passes of any architecture may raise anything
        if is_out_of_memory(error):
            raise ModelError("memory is too small for so many tokens; take fewer at once") from error
        what = f"a {model.config.model_type} model does not run with a key/value cache, so it cannot be measured with"
        raise UnsupportedModelError(f"{what} one ({type(error).__name__}: {first_line(error)[:160]})") from error


def cached_bytes(config: Any, item: int) -> int:
    """Bytes of a token's keys and values, of ``item`` bytes each; a layer's are copied when they grow, so one more."""
    config = config.get_text_config()
    heads = number_of(config, "num_attention_heads", 1)
    width = number_of(config, "head_dim", config.hidden_size // heads) * number_of(config, "num_key_value_heads", heads)
    return int(2 * width * item * (config.num_hidden_layers + 1))


def number_of(config: Any, name: str, default: int) -> int:
    """A number of the configuration; ``default`` where it has none, or one for each layer."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers refuses to read it where layers differ
        return default
    return value if isinstance(value, int) else default


@contextmanager
def fast_one_token_attention() -> Iterator[None]:
    """While active, ``sdpa`` on a CPU computes the attention of a single query in each sequence by matrix products."""
    # Not under a name of its own: models with sparse attention (DeepSeek-V3.2) leave its mask out unless the name is
    # "sdpa" or "eager".
    own: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(
        module: Any, query_BHQD: Any, key_BGTD: Any, value_BGTE: Any, attention_mask: Any, **options: Any
    ) -> Any:
        batch, heads, queries, dim = query_BHQD.shape
        others = [options.get(name) for name in ("position_bias", "softcap", "output_attentions")]
        more = options.get("dropout") or any(value is not None and value is not False for value in others)
        # A mask is left out by transformers where the query attends to all tokens.
        masked = attention_mask is not None and attention_mask.shape[1:] != (1, 1, key_BGTD.shape[2])
        if more or masked or queries > 1 or query_BHQD.device.type != "cpu":
            return own(module, query_BHQD, key_BGTD, value_BGTE, attention_mask, **options)
        # The query heads of a group, which share keys and values, are the rows of one product.
        groups, scaling = key_BGTD.shape[1], options.get("scaling")
        scale = dim**-0.5 if scaling is None else scaling
        # In float32, as oneDNN, which multiplies bfloat16, keeps code of its own for every number of cached tokens.
        with torch.autocast("cpu", enabled=False):
            rows_BGRD = scale * query_BHQD.float().reshape(batch, groups, heads // groups, dim)
            weights_BGRT = rows_BGRD @ key_BGTD.float().transpose(-1, -2)
            if attention_mask is not None and attention_mask.dtype == torch.bool:
                weights_BGRT = weights_BGRT.masked_fill(~attention_mask, -torch.inf)
            elif attention_mask is not None:
                weights_BGRT = weights_BGRT + attention_mask
            attended_BGRE = weights_BGRT.softmax(-1) @ value_BGTE.float()
        # As many sequences as have keys, also where their queries are the same.
        return attended_BGRE.reshape(len(attended_BGRE), 1, heads, -1).to(value_BGTE.dtype), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = own
