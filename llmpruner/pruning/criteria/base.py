"""The base class of importance criteria."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from ...component import Component
from ...engine.signals import ParameterSignals, Product, Signal, StreamStats, TokenStats, UnitAxis
from ...structure.coupling import LAYER, VOCABULARY, Role

if TYPE_CHECKING:
    import torch


class ImportanceCriterion(Component):
    """Computes a saliency of every weight, or a score of every unit; higher is more important.

    A complete criterion::

        class Magnitude(ImportanceCriterion):
            name = "magnitude"
            summary = "sum of |w| to a power"

            class Settings(ComponentSettings):
                power: float = Field(1.0, gt=0, description="The power.")

            settings: Settings

            def saliency(self, signals):
                return signals.weight.abs() ** self.settings.power

    Override one of four methods:

    - `saliency`: one tensor for each parameter; the core sums it over what each unit owns, for every group and span.
    - `score_units`: scores of the units on one axis of a parameter, for each (group, span) of it.
    - `score_layers`: scores of all layers, from the residual stream.
    - `score_tokens`: scores of all tokens of the vocabulary, from their use.

    Tell parameters apart by kinds of units and roles, not by module names. Do not change arguments in place. Scores
    that are not finite end the command; raise `UnsupportedModelError` for a model whose signals do not suffice.
    """

    kind: ClassVar[str] = "criterion"
    hook: ClassVar[str] = "llmpruner_importance_criteria"
    kinds: ClassVar[frozenset[str] | None] = None
    """Kinds of units that it can score; None: all but tokens. See `accepts`."""
    roles: ClassVar[frozenset[Role] | None] = None
    """Roles of the spans that are scored; None: all. A group without such spans is scored on all its spans."""

    by_matrix: ClassVar[bool] = False
    """Whether matrices of a stack (experts) are scored one by one, which saves memory: `saliency` gets one at a time,
    with a first axis of length one, and `score_units` is not called for stacks."""

    @property
    def needs(self) -> frozenset[Signal]:
        """The signals to measure, by default weights; others need text. An attribute of the class, or a property."""
        return frozenset({Signal.WEIGHT})

    @property
    def signed(self) -> bool:
        """Whether the saliencies of one index are summed before the absolute value is taken, instead of after."""
        return False

    def accepts(self, kind: str) -> bool:
        """Whether units of this kind can be scored: layers alone from the stream, tokens alone from their use."""
        if self.needs & {Signal.STREAM, Signal.STREAM_BLOCKS}:
            return kind == LAYER
        if kind == VOCABULARY or Signal.TOKENS in self.needs:
            return kind == VOCABULARY and Signal.TOKENS in self.needs
        return self.kinds is None or kind in self.kinds

    def counts(self, axis: UnitAxis) -> bool:
        """Whether a span counts for the scores of its group: by `roles`. Not called for layers."""
        return self.roles is None or axis.role in self.roles

    def measure(self, product: Product) -> Mapping[str, torch.Tensor]:
        """Statistics of one product of tokens with a weight; empty for products that are not needed. Called with
        `Signal.PRODUCT` or `Signal.PRODUCT_GRAD`, in any order. Tensors of one name have one shape for all products of
        a parameter; `saliency` and `score_units` get their sums in float64, ``signals.products.sums[name]``."""
        raise NotImplementedError

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        """Saliency of every weight, a floating-point tensor with the shape of ``signals.weight`` and on its device. The
        absolute values are summed in float64 over what each unit owns (with `signed`, the sums come first)."""
        raise NotImplementedError

    def score_units(self, signals: ParameterSignals, axis: UnitAxis, index_UK: torch.Tensor) -> torch.Tensor | None:
        """Scores of the units on one axis of a parameter, (units,), of any real dtype; None for the sums of saliencies.
        ``index_UK``: the indices on ``axis.axis`` that each unit owns, (units, width), int64, on the device of
        ``signals.weight``; for layers, one unit that owns all indices of axis 0."""
        return None

    def score_layers(self, stream: StreamStats) -> torch.Tensor:
        """Scores of all layers, (layers,), of any real dtype. No other method is called for criteria of the stream."""
        raise NotImplementedError

    def score_tokens(self, use: TokenStats) -> torch.Tensor:
        """Scores of all tokens, (V,), of any real dtype. No other method is called for criteria of tokens. Where
        other kinds are cut too, scores are what the removal of a token costs, in nats per token of the text."""
        raise NotImplementedError
