"""ImportanceCriterion: how much each weight or unit matters, seen one parameter at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from ..component import Component
from ..engine.position import UnitAxis
from ..engine.signals import ParameterSignals, Product, Signal, StreamStats
from ..structure.coupling import LAYER, Role

if TYPE_CHECKING:
    import torch

_STREAM = frozenset({Signal.STREAM, Signal.STREAM_BLOCKS})


class ImportanceCriterion(Component):
    """Gives every weight a saliency, or every unit a score; higher is more important.

    A complete criterion, as a plugin would write it::

        class Magnitude(ImportanceCriterion):
            name = "magnitude"
            summary = "sum of |w| to a power"

            class Settings(ComponentSettings):
                power: float = Field(1.0, gt=0, description="The power.")

            settings: Settings

            def saliency(self, signals):
                return signals.weight.abs() ** self.settings.power

    There are three ways to score, from the plainest to the most special:

    - `saliency`: one tensor for each parameter; the core sums it over what each unit owns, for every group and span.
    - `score_units`: scores for the units on one axis of a parameter, for each (group, span) of it.
    - `score_layers`: scores for all layers, from the residual stream.

    A criterion is given the signals that `signals` asks for. It is never given module names: a parameter is described
    by kinds of units, roles and the number of its layer. Nothing that is given may be changed in place.
    """

    kind: ClassVar[str] = "criterion"
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.WEIGHT})
    """What to measure; anything beyond weights needs a calibration set."""
    kinds: ClassVar[frozenset[str] | None] = None
    """Kinds of units that it can score; None: all. Criteria that need the residual stream score layers alone."""
    roles: ClassVar[frozenset[Role] | None] = None
    """Spans that count, by role; None: all. A group that has none of them is scored on all its spans."""

    @property
    def signals(self) -> frozenset[Signal]:
        """What this instance needs; override when it depends on settings."""
        return self.needs

    @property
    def signed(self) -> bool:
        """Whether the saliencies of one index are summed with their sign before the absolute value is taken
        (a first-order change of the loss by a whole row) rather than after."""
        return False

    def accepts(self, kind: str) -> bool:
        """Whether units of this kind can be scored."""
        if self.signals & _STREAM:
            return kind == LAYER
        return self.kinds is None or kind in self.kinds

    def counts(self, axis: UnitAxis) -> bool:
        """Whether a span counts towards the scores of its group; by default, by its role. A group of which no span
        counts is scored on all. Of whole layers every parameter counts, and this is not asked.
        """
        return self.roles is None or axis.role in self.roles

    def measure(self, product: Product) -> Mapping[str, torch.Tensor]:
        """Statistics of one product of tokens with a weight, for `Signal.PRODUCT` and `Signal.PRODUCT_GRAD`.

        Called for every product with a parameter that counts, for each micro-batch, and each expert that tokens are
        routed to. What is returned under one name must have one shape for all products with a parameter; it is added up
        in float64, and reaches `saliency` and `score_units` as ``signals.products.sums[name]``. Return an empty mapping
        for products that do not matter. Products may come in any order: what depends on the order of samples uses
        `Product.samples` as weights of a sum.
        """
        raise NotImplementedError

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        """Saliency of every weight, a floating-point tensor with the shape of the parameter. Computed once for each
        parameter, whatever the number of groups and spans that it belongs to."""
        raise NotImplementedError

    def score_units(self, signals: ParameterSignals, axis: UnitAxis, index_UK: torch.Tensor) -> torch.Tensor | None:
        """Scores of whole units on one axis of a parameter, (units,), where a sum of saliencies is not what is wanted;
        None for that sum. Called for each (group, span) of the parameter.

        ``index_UK``: the indices on ``axis.axis`` that each unit owns, (units, width), int64. For whole layers, one
        unit that owns all indices of axis 0.
        """
        del signals, axis, index_UK
        return None

    def score_layers(self, stream: StreamStats) -> torch.Tensor:
        """Scores of all layers, (layers,); for criteria that need `Signal.STREAM` or `Signal.STREAM_BLOCKS`, of which
        nothing else is asked."""
        raise NotImplementedError
