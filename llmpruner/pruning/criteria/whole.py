"""Criteria for whole experts, whole layers, and tokens of the vocabulary, by what they do on a text.

``f_j(x)`` is the output of expert j on the token x, before the router's weight ``g_j(x)`` of the expert for the token;
``X_j`` are the calibration tokens that are routed to j. Experts without tokens score 0. Each expert is scored alone: of
two that compute the same, neither is ranked lower for it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator, Field

from ...calibration.documents import check_source, read_documents
from ...component import ComponentSettings
from ...engine.signals import ParameterSignals, Product, Signal, StreamStats, TokenStats, UnitAxis
from ...errors import SelectionError, UnsupportedModelError, near
from ...structure.coupling import EXPERT, MLP
from ...values import Names
from .base import ImportanceCriterion

if TYPE_CHECKING:
    import torch

    from ...engine.walk import CalibrationSet

PIECES = 6.0
"""What text costs more, in nats, where a token arrives in pieces: about the mean of log p(token) − log p(its first
piece), for all tokens alike. It matters only where tokens are compared with other units."""
PREDICTION = 16
"""Tokens of text that one prediction of the model is worth, which is about all tokens at once."""
PRIOR = 1_000_000
"""Tokens of text that the rank of a token in the vocabulary is worth."""


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
    expert adds to the residual stream in total. Rarely used experts rank low even if their tokens depend on them."""

    name = "expert-contribution"
    summary = "for experts: router weight × norm of the output, summed over an expert's tokens"
    by_layer = True

    def of_tokens(self, product: Product) -> torch.Tensor:
        return product.gates * super().of_tokens(product)


class BlockInfluence(ImportanceCriterion):
    """1 − E[cos(h_l, h_l+1)] over tokens, h_l the hidden states before layer l (ShortGPT; Men et al., 2024, eq. 1)."""

    name = "block-influence"
    summary = "for layers: 1 − mean cosine of the hidden states before and after (ShortGPT, eq. 1)"
    needs = frozenset({Signal.STREAM})

    def score_layers(self, stream: StreamStats) -> torch.Tensor:
        return 1.0 - stream.cosine


class AngularDistance(ImportanceCriterion):
    """E[arccos cos(h_l, h_l+1)]/π over tokens: the angular distance of Gromov et al. (2024, eq. 7) for n = 1."""

    name = "angular"
    summary = "for layers: mean angle between the hidden states before and after, in units of π (Gromov et al., eq. 7)"
    needs = frozenset({Signal.STREAM})

    def score_layers(self, stream: StreamStats) -> torch.Tensor:
        return stream.angle


class AngularBlock(ImportanceCriterion):
    """The least angular distance E[arccos cos(h_l, h_l+n)]/π of all blocks l … l+n−1 of removable layers that a layer
    is in, n being the number of layers that go: so these are one block, the one whose output is nearest to its input
    (Gromov et al., 2024, algorithm 1). `AngularDistance` scores each layer alone, and may remove layers that change
    little by themselves and much together. Hidden states before n layers are kept, in memory up to a limit."""

    name = "angular-block"
    summary = "for layers: the block of n layers with the least angle between its input and output (Gromov et al.)"
    needs = frozenset({Signal.STREAM_BLOCKS})

    def score_layers(self, stream: StreamStats) -> torch.Tensor:
        n, layers = stream.length, len(stream.angle)
        removable = range(layers) if stream.removable is None else stream.removable
        blocks = [list(range(start, start + n)) for start in range(layers - n + 1)]
        blocks = [block for block in blocks if all(layer in removable for layer in block)]
        if not blocks:
            raise SelectionError(
                f"criterion {self.name} removes a block of layers, and no {n} successive layers may be removed; choose "
                "fewer layers, or more with --set prune.layers"
            )
        # Beyond any angle, so that layers outside of all blocks go last.
        scores = stream.angle.new_full((layers,), 2.0)
        for block in blocks:
            scores[block] = scores[block].clamp_max(stream.angle[block[0]])
        return scores


def _readable(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        check_source(name)
    return names


def _known_scripts(names: tuple[str, ...]) -> tuple[str, ...]:
    known = {script.lower() for script in scripts_of("".join(map(chr, range(0x20000))))}
    for name in names:
        if name.lower() not in known:
            raise ValueError(f"Unicode has no script '{name}'{near(name, known)}")
    return names


class TokenUse(ImportanceCriterion):
    """The share of text that is written in a token, times `PIECES`, in nats per token of text: how often it is in the
    calibration text, and expected there by the model (`PREDICTION`), with a prior (`PRIOR`) by its rank r in the
    vocabulary, 1 / (r + 10) by Zipf's law, as merges are in the order of their use."""

    name = "vocabulary"
    summary = "for tokens: their share of the calibration text and of the model's predictions, with their rank as prior"
    needs = frozenset({Signal.TOKENS})

    class Settings(ComponentSettings):
        tokens: int | None = Field(
            None, ge=1, description="Number of tokens to keep, in place of --ratio; with --kinds vocabulary alone."
        )
        keep: Annotated[Names, AfterValidator(_readable)] = Field(
            (), description="Files with text whose tokens go last, whatever the calibration text is."
        )
        scripts: Annotated[Names, AfterValidator(_known_scripts)] = Field(
            (), description="Scripts to keep, such as latin,cyrillic,cjk: tokens with letters of others go first."
        )

    settings: Settings

    def score_tokens(self, use: TokenStats) -> torch.Tensor:
        import torch

        ranks = torch.arange(len(use.counts), dtype=torch.float64)
        prior = 1 / (ranks + 10)
        share = use.counts + PREDICTION * use.expected + PRIOR * prior / prior.sum()
        share = share / (int(use.counts.sum()) + PREDICTION * use.predicted + PRIOR)
        if use.tokenizer is not None:
            share[len(use.tokenizer) :] = 0  # rows that no token has
            for text in (document for name in self.settings.keep for document in read_documents(name)):
                ids = torch.tensor(use.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]).long()
                share[ids[ids < len(share)]] += 1  # added tokens may have no row
            if self.settings.scripts:
                kept = {name.upper() for name in self.settings.scripts}
                for token, text in enumerate(texts_of(use.tokenizer)[: len(share)]):
                    if scripts_of(text) - kept:
                        share[token] *= 1e-9
        return share * PIECES


def texts_of(tokenizer: Any) -> list[str]:
    """The text of every token; those of single bytes are replacement characters."""
    return [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in range(len(tokenizer))]


def scripts_of(text: str) -> set[str]:
    """The scripts of the letters in ``text``, as Unicode's names of characters begin: LATIN, CYRILLIC, CJK."""
    return {unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha()}


def counted_part(text: CalibrationSet) -> CalibrationSet:
    """The part of a calibration text on which tokens are counted; the rest tells how many other texts need."""
    return text.first(text.input_ids.numel() * 7 // 8)
