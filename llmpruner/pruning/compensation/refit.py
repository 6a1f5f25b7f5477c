"""Refit: weights that read removed units are fitted again by least squares. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ...component import ComponentSettings
from ...errors import SettingsError
from ...structure.coupling import Role
from ...values import names_of
from .base import Compensation, Repaired, RepairTask

if TYPE_CHECKING:
    from ...structure.coupling import CouplingGraph
    from ...structure.kept import Kept


class Refit(Compensation):
    """Fits every weight matrix that loses inputs again, with its bias where it has one, on the kept inputs, by ridge
    regression against the dense model (`compensation.least_squares`). Layers are fitted in order, each on the
    outputs of compensated layers (`llmpruner.pruning.compensation.repair`)."""

    name = "refit"
    summary = "weights that read removed units are fitted again by least squares against the dense model"
    by_layer = True
    changes_readers_alone = True
    ranks_again = True

    class Settings(ComponentSettings):
        mix: float = Field(
            0.5,
            ge=0,
            le=1,
            description="Target of each fit: 0 is the output of the uncut layer in the pruned model; 1 also adds the "
            "whole difference of the hidden states from the dense model's.",
        )
        target: Literal["mix", "held-out"] = Field(
            "mix",
            description="mix: as the setting `mix` says; held-out: each fit takes the share of the difference, of 0, "
            "0.25, 0.5, 0.75 and 1, that brings tokens which are held out nearest to the dense model.",
        )
        also: Annotated[tuple[str, ...], BeforeValidator(names_of)] = Field(
            (),
            description="Kinds of units whose readers are fitted too where they lost no inputs, in layers after the "
            "first that was cut: with attention, the output projections of attention. A fit that is not better on "
            "tokens that are held out is not used.",
        )
        token_weights: Literal["none", "divergence"] = Field(
            "none",
            description="Weights of the tokens in the fits: all alike, or by the divergence of a model with the same "
            "cut and a simpler fit from the dense one, which takes about as long again.",
        )
        held_out: Literal["tokens", "sources"] = Field(
            "tokens",
            description="By what the strength of a fit is chosen: the error on one token in eight, or, with text of "
            "several sources, that on one half of the sources of the fit to the other.",
        )

    settings: Settings

    def __init__(self, settings: ComponentSettings | None = None, /, **values: Any) -> None:
        """Raises `SettingsError`, also for settings that have no effect together: ``also`` with ``mix = 0``, where
        targets are the weights' own outputs, and a ``mix`` beside a target that is chosen."""
        super().__init__(settings, **values)
        if self.chooses_target and self.settings.mix != self.Settings.model_fields["mix"].default:
            raise SettingsError(
                f"{self.label()}: mix = {self.settings.mix} has no effect with target = held-out; leave one out"
            )
        if self.settings.also and not self.settings.mix:
            raise SettingsError(
                f"{self.label()}: also = '{', '.join(self.settings.also)}' has no effect with mix = 0; leave one out"
            )

    @property
    def weighs_tokens(self) -> bool:
        return self.settings.token_weights == "divergence"

    @property
    def chooses_target(self) -> bool:
        return self.settings.target == "held-out"

    @property
    def holds_out_sources(self) -> bool:
        return self.settings.held_out == "sources"

    def changed_groups(self, graph: CouplingGraph, kept: Kept) -> Collection[str]:
        """Also those of the kinds in ``also``. Raises `SettingsError` for a kind without such readers in the model."""
        read: dict[str, list[str]] = {}
        for group in graph.groups:
            matrices = [s for s in group.spans_with(Role.CONSUMES) if len(graph.shapes[s.parameter]) == 2]
            if group.layer is not None and matrices:
                read.setdefault(group.kind, []).append(group.name)
        for kind in self.settings.also:
            if kind not in read:
                raise SettingsError(
                    f"{self.label()}: also = '{kind}' is refused: no weight matrix reads such units inside a layer of "
                    f"this model; expected of: {', '.join(read)}"
                )
        return tuple(dict.fromkeys([*kept, *(name for kind in self.settings.also for name in read[kind])]))

    def repair(self, task: RepairTask) -> Repaired:
        from . import fitters, repair

        return repair.repair(
            task,
            fitters.WeightFitter,
            mix=None if self.chooses_target else self.settings.mix,
            changed=self.changed_groups(task.graph, task.kept),
            weighted=self.weighs_tokens,
            holds_out_sources=self.holds_out_sources,
        )
