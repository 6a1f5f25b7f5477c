"""The weight of each row of a product in a fit, and whether the row is of the source of text that is held out.

Where sources of the calibration text are held out, they are dealt to two sides in turn. Each side is held out while the
fit to the other is judged, so that what fits one source alone is not taken for an improvement.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...engine.products import Routing, all_tokens
from ...errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...calibration.calibration import CalibrationSet
    from ...engine.products import WatchedProduct, WatchProducts
    from ...engine.walk import Batch


@dataclass(frozen=True)
class Rows:
    """One value for each row of a product. ``weights``: float32, mean 1 over all tokens; None: all count alike.
    ``second``: bool, whether the row is of the second side; None with one source, and where that is not known."""

    weights: torch.Tensor | None = None
    second: torch.Tensor | None = None

    def weighted(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` (rows, …) in float32, times the root of the weights: products of two such are weighted sums."""
        values = values.float()
        return values if self.weights is None else values * self.weights.sqrt()[:, None]


ALIKE = Rows()
"""Rows of which nothing is known."""


class CalibrationRows:
    """Assigns rows of products to tokens of ``calibration``. ``weights``: of the tokens, float32 (samples, length),
    mean 1; None: all count alike."""

    def __init__(self, model: PreTrainedModel, calibration: CalibrationSet, weights: torch.Tensor | None) -> None:
        self._model, self._weights, self._length = model, weights, calibration.input_ids.shape[1]
        self._second = torch.tensor([part % 2 == 1 for part in calibration.parts])
        self._routing: Routing | None = None

    @property
    def known(self) -> bool:
        """Whether rows differ in anything."""
        return self._weights is not None or len(self._second) > 0

    @contextlib.contextmanager
    def following(self, watch: WatchProducts, names: Collection[str]) -> Iterator[None]:
        """While active, `of` finds the rows of the weights ``names``, whose products ``watch`` observes."""
        if not self.known:
            yield
            return
        self._routing = Routing(self._model, names)
        watch.add(self._routing.names, self._routing.rows_of)
        with self._routing.following():
            yield

    def of(self, batch: Batch, product: WatchedProduct) -> Rows:
        """Called for a product while it is observed. Raises `UnsupportedModelError` where rows cannot be assigned to
        tokens that have weights."""
        if self._routing is None:
            return ALIKE
        routed = None if product.slot is None else self._routing.rows_of(product)
        tokens = all_tokens(product, len(batch.input_ids), self._length) if routed is None else routed.tokens
        if tokens is None and self._weights is not None:
            raise UnsupportedModelError(
                f"the rows of '{product.parameter}' cannot be assigned to tokens; use --set refit.token_weights=none"
            )
        if tokens is None:
            return ALIKE
        weights = second = None
        if self._weights is not None:
            first = batch.first * self._length
            weights = self._weights.flatten()[first + tokens.cpu()].to(tokens.device)
        if len(self._second):
            second = self._second[batch.first + tokens.cpu() // self._length].to(tokens.device)
        return Rows(weights, second)
