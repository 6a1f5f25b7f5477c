"""A criterion that follows how important a channel is from one calibration sample to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field

from llmpruner import ComponentSettings, ImportanceCriterion, ParameterSignals, Product, Role, Signal, hookimpl


class Ema(ImportanceCriterion):
    """Exponential moving average over the samples t, in calibration order, of a_t = Σ|g·x| (or Σ|x|) over the tokens of
    a sample: m_t = d·m_(t−1) + (1 − d)·a_t with m_0 = 0, so that m_T = Σ_t (1 − d)·d^(T−t)·a_t, which is a sum."""

    name = "ema"
    summary = "exponential moving average over samples of |gradient × input| or |input| of a channel"
    roles = frozenset({Role.CONSUMES})

    class Settings(ComponentSettings):
        of: Literal["gradient", "activation"] = Field("gradient", description="|gradient × input|, or |input|.")
        decay: float = Field(0.9, gt=0, lt=1, description="d, the share that each sample leaves of those before it.")

    settings: Settings

    @property
    def signals(self) -> frozenset[Signal]:
        product = Signal.PRODUCT_GRAD if self.settings.of == "gradient" else Signal.PRODUCT
        return frozenset({Signal.WEIGHT, product})

    def measure(self, product: Product) -> Mapping[str, torch.Tensor]:
        value = product.inputs.abs()
        if self.settings.of == "gradient":
            value = value * product.input_grads.abs()
        decay = self.settings.decay
        share = (1 - decay) * decay ** (product.num_samples - 1 - product.samples).double()
        return {"ema": share @ value.double()}

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        if signals.products is None:
            return torch.zeros_like(signals.weight)
        return signals.over_inputs(signals.products.sums["ema"])


@hookimpl
def llmpruner_importance_criteria() -> list[type[ImportanceCriterion]]:
    return [Ema]
