"""Running a model with its key/value cache, for costs that cannot be computed from shapes."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from ..errors import LlmprunerError, ModelError, UnsupportedModelError, first_line
from .logits import last_logits
from .out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


class CachedModel:
    """A model with the key/value cache of the tokens that it has processed. ``cache``: an empty one; by default one
    that grows."""

    def __init__(self, model: PreTrainedModel, cache: Cache | None = None) -> None:
        self.model = model
        with _in_one_line(model):
            self.cache = DynamicCache(config=model.config) if cache is None else cache
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
