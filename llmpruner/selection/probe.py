"""Cut copies of a model at work: for costs that shapes cannot tell."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from ..coupling import LAYER, CouplingGraph, Role
from ..errors import LlmprunerError, UnsupportedModelError
from ..evaluation.cost import cache_argument
from ..surgery import Kept, cut

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from ..families import ModelFamily


def with_rules(family: ModelFamily, model: PreTrainedModel, kinds: Collection[str]) -> ModelFamily:
    """``family``, or where it is left to discovery what must follow cuts of ``kinds``, found once for many cuts."""
    from ..discovery.follow import Follower

    if not family.is_discovered or isinstance(family, Follower):
        return family
    from ..discovery.verify import rules_of
    from ..shim import stock_config

    return Follower(rules_of(stock_config(model), set(kinds) - {LAYER}))


def cut_copy(
    model: PreTrainedModel,
    graph: CouplingGraph,
    kept: Kept,
    family: ModelFamily,
    instead: Mapping[str, nn.Parameter] | None = None,
) -> PreTrainedModel:
    """A copy of ``model`` cut to ``kept``. It shares the weights that stay whole, so it takes only the memory of what
    is left of the others. ``instead``: parameters, by name, that stand in for the model's own before the cut."""
    # Norms over cut units are rescaled in place.
    rescaled = {span.parameter for group in graph.groups for span in group.spans_with(Role.NORM)}
    shared = {id(p): p for name, p in model.named_parameters() if name not in rescaled}
    shared |= {id(model.get_parameter(name)): parameter for name, parameter in (instead or {}).items()}
    copied = copy.deepcopy(model, shared)
    cut(copied, graph, kept, family)
    return copied


class Reading:
    """A model with the cache of what it has read so far."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers import DynamicCache

        self.model = model
        with _in_one_line(model):
            self.cache = DynamicCache(config=model.config)

    @torch.inference_mode()
    def read(self, tokens: torch.Tensor) -> None:
        """``tokens``: ids of shape (1, n). Raises `UnsupportedModelError` when the model cannot go on from a cache."""
        options = {cache_argument(self.model): self.cache}
        with _in_one_line(self.model):
            self.model(input_ids=tokens.to(self.model.device), use_cache=True, **options)

    @torch.inference_mode()
    def again(self) -> Reading:
        """Another reading that goes on from here."""
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
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:160]}"
        raise UnsupportedModelError(
            f"a {model.config.model_type} model does not read with a key/value cache, so what it costs there cannot be "
            f"measured ({reason}); choose another --budget"
        ) from error


def sample_tokens(model: PreTrainedModel, count: int) -> torch.Tensor:
    """Ids of shape (1, count), always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(int(model.config.get_text_config().vocab_size), (1, count), generator=generator)
