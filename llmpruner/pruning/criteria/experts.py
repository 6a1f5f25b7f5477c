"""Criteria for experts, of their outputs on the tokens that the router sends to them.

``f_j(x)`` is the output of expert j on the token x, before the router's weight ``g_j(x)`` of the expert for the token;
``X_j`` are the calibration tokens that are routed to j. Experts without tokens score 0. All four score each expert
alone: of two experts that compute the same, neither is ranked lower for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ...component import ComponentSettings
from ...engine.signals import ParameterSignals, Product, Signal, UnitAxis
from ...errors import UnsupportedModelError
from ...structure.coupling import EXPERT, MLP
from .base import ImportanceCriterion

if TYPE_CHECKING:
    import torch


class OfExpertOutputs(ImportanceCriterion):
    """Scores an expert by a sum over its tokens, divided by their number."""

    needs = frozenset({Signal.PRODUCT})
    kinds = frozenset({EXPERT})
    by_layer: ClassVar[bool] = False
    """Whether sums are divided by the tokens of all experts of the layer instead."""

    def counts(self, axis: UnitAxis) -> bool:
        """Of all that an expert owns, the projection that reads its inner channels: it computes the output."""
        return MLP in axis.reads

    def measure(self, product: Product) -> Mapping[str, torch.Tensor]:
        if product.expert is None or MLP not in product.reads:
            return {}
        # Where a model computes every expert on all tokens, those that are not routed to one have inputs of zero.
        routed = product.inputs.any(1) if product.row_gates is None else product.inputs.new_ones(len(product.inputs))
        return {"sum": (self.of_tokens(product) * routed).sum(), "tokens": routed.float().sum()}

    def of_tokens(self, product: Product) -> torch.Tensor:
        """What each token of an expert adds to its sum, (rows,), float32; by default the norm of the output."""
        norms: torch.Tensor = product.outputs.norm(dim=1)
        return norms

    def score_units(self, signals: ParameterSignals, axis: UnitAxis, index_UK: torch.Tensor) -> torch.Tensor:
        if signals.products is None or not (sums := signals.products.sums):
            raise UnsupportedModelError(
                f"{self.name} cannot tell which weights compute the outputs of this model's experts; choose another "
                "criterion"
            )
        tokens = sums["tokens"].sum() if self.by_layer else sums["tokens"]
        return (sums["sum"] / tokens.clamp_min(1))[index_UK].sum(1)


class ExpertReap(OfExpertOutputs):
    """mean over X_j of ``g_j(x)·‖f_j(x)‖₂``, with the router's weights renormalised over the experts chosen for each
    token: router-weighted expert activation pruning (REAP; Lasby et al., 2025). An expert is not ranked lower for being
    rarely used. With one expert per token the renormalised weight is 1, and the score that of `ExpertNorm`."""

    name = "expert-reap"
    summary = "for experts: mean of router weight × norm of the output over an expert's tokens (REAP)"

    class Settings(ComponentSettings):
        renormalize: bool = Field(
            True,
            description="Divide the router's weights of a token by their sum over the chosen experts, also where the "
            "model does not; else take them as the model applies them.",
        )

    settings: Settings

    def of_tokens(self, product: Product) -> torch.Tensor:
        gates = product.gate_shares if self.settings.renormalize else product.gates
        return gates * super().of_tokens(product)


class ExpertNorm(OfExpertOutputs):
    """mean over X_j of ``‖f_j(x)‖₂``: the norm of an expert's outputs, whatever weight the router gives them."""

    name = "expert-norm"
    summary = "for experts: mean norm of the output over an expert's tokens, without the router's weight"


class ExpertFrequency(OfExpertOutputs):
    """``|X_j|/Σ_i|X_i|``: the share of a layer's routed tokens that an expert gets; a token counts once for each expert
    chosen for it. Outputs are not looked at: an expert that adds nothing ranks high if the router often chooses it."""

    name = "expert-frequency"
    summary = "for experts: share of the tokens that the router sends to an expert"
    by_layer = True

    def of_tokens(self, product: Product) -> torch.Tensor:
        return product.inputs.new_ones(len(product.inputs))


class ExpertContribution(OfExpertOutputs):
    """``Σ over X_j of g_j(x)·‖f_j(x)‖₂ / Σ_i|X_i|``, with the router's weights as the model applies them: what an
    expert adds to the residual stream in total. It is the weighted mean times the frequency, so rarely used experts
    rank low even if their tokens depend on them."""

    name = "expert-contribution"
    summary = "for experts: router weight × norm of the output, summed over an expert's tokens"
    by_layer = True

    def of_tokens(self, product: Product) -> torch.Tensor:
        return product.gates * super().of_tokens(product)
