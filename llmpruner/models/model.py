"""A model, with and without its weights: the values that stages take and return."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..structure.outcome import Outcome
from ..structure.plan import PruningPlan
from ..values import html_table
from .reference import Reference
from .vocabulary import InTokens, old_ids
from .weights import StreamedWeights, Weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..structure.coupling import CouplingGraph
    from .family import ModelFamily


@dataclass(eq=False, repr=False)
class Structure:
    """A model without its weights.

    ``reference``: what the user named, and where its files are. ``config``: of the dense model. ``graph``: the coupled
    groups after all cuts. ``plans``: the cuts that were applied. ``record``: its ``llmpruner.json``; of an adapter,
    that of its base, with the adapter's training.
    """

    reference: Reference
    config: PreTrainedConfig
    family: ModelFamily
    graph: CouplingGraph
    plans: tuple[PruningPlan, ...] = ()
    record: Mapping[str, Any] | None = None

    @property
    def ref(self) -> str:
        """What the user named."""
        return self.reference.ref

    @property
    def path(self) -> str | None:
        """The absolute path of local files; None for a hub id, the demo model and one that was made in memory."""
        return self.reference.path

    def __repr__(self) -> str:
        state = f"pruned {len(self.plans)} times" if self.plans else "not pruned"
        size = f"{self.graph.num_layers} layers, {self.graph.total_parameters:,} parameters"
        return f"<{type(self).__name__} '{self.ref}': {self.config.model_type}, {size}, {state}>"

    def _repr_html_(self) -> str:
        """A table for notebooks: family, layers, parameters, and the kinds of units."""
        graph = self.graph
        values: dict[str, object] = {"model": self.ref, "family": self.family.name, "layers": graph.num_layers}
        values |= {"parameters": f"{graph.total_parameters:,}", "decoder parameters": f"{graph.decoder_parameters:,}"}
        values |= {f"{kind} groups": len(graph.of_kinds([kind])) for kind in graph.kinds}
        return html_table([(name, str(value)) for name, value in values.items()])


@dataclass(eq=False, kw_only=True, repr=False)
class Model(Structure):
    """A model with its weights. ``network``: the transformers model, which stages change in place. ``tokenizer``: None
    where the checkpoint has none. ``outcome``: sizes before and after the last cut in this process. ``form``: of the
    last `llmpruner.save` in this process. ``work``: for each cut in this process, ``fits`` as ``llmpruner.json`` keeps
    them. ``streamed``: reads the weights when they are needed; None where they are in memory. ``unfinished``: the stage
    that began to change the weights and did not end; None for a model that is whole."""

    network: PreTrainedModel
    tokenizer: Any | None
    outcome: Outcome | None = None
    form: str | None = None
    work: tuple[Mapping[str, Any], ...] = ()
    streamed: StreamedWeights | None = None
    unfinished: str | None = None

    @property
    def weights(self) -> Weights:
        """Where the weights of ``network`` come from."""
        return self.streamed or Weights(self.network, self.graph.layers)

    @contextlib.contextmanager
    def changing(self, stage: str) -> Iterator[None]:
        """For what changes the weights in place. Where it ends by an exception, the model stays ``unfinished``."""
        self.unfinished = stage
        yield
        self.unfinished = None

    def become(self, result: Model) -> Model:
        """This object with all fields of ``result``: the caller's object must describe the weights changed in place."""
        vars(self).update(vars(result), unfinished=None)
        return self

    def check_whole(self) -> None:
        """Raise `ModelError` for a model that is ``unfinished``."""
        if self.unfinished is not None:
            left = f"'{self.ref}' was left half-changed by a {self.unfinished} that did not end"
            raise ModelError(f"{left}; load the model again")

    def in_tokens_of(self, trimmed: Model) -> Any:
        """The network; where ``trimmed`` has fewer of its tokens, as `InTokens`."""
        return self._in_tokens(trimmed.tokenizer, trimmed.network.get_input_embeddings().weight.shape[0])

    def teacher_of(self, pruned: Structure, tokenizer: Any) -> Any:
        """The same for a model that was pruned from this one and learns from it, which need not be loaded."""
        embedding = self.network.get_input_embeddings().weight
        name = next(name for name, parameter in self.network.named_parameters() if parameter is embedding)
        return self._in_tokens(tokenizer, pruned.graph.shapes[name][0], teaching=True)

    def _in_tokens(self, tokenizer: Any, rows: int, *, teaching: bool = False) -> Any:
        """The network; as `InTokens` for a model of fewer ``rows`` of embeddings, whose tokens are its own."""
        before = self.network.get_input_embeddings().weight.shape[0]
        if (old := None if rows >= before else old_ids(self.tokenizer, tokenizer)) is None:
            return self.network
        whole, kept = self.tokenizer, {*old}
        assert tokenizer is not None and whole is not None, "they were compared"
        split = tokenizer.backend_tokenizer.model.tokenize
        pieces = {n: tuple(part.id for part in split(token)) for token, n in whole.get_vocab().items() if n not in kept}
        # There may be rows that no token has, or added tokens without a row.
        old = [*old, *range(len(whole), len(whole) + rows - len(old))][:rows]
        return InTokens(self.network, old, pieces, teaching)
