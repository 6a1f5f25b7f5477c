"""ModelFamily: what the stages need to know about one model architecture; and AutoFamily, for all others."""

from __future__ import annotations

from collections.abc import Sequence
from types import NotImplementedType
from typing import TYPE_CHECKING, ClassVar

from ..component import Component
from ..structure.coupling import CoupledGroup
from .chat_format import ALPACA, ChatFormat

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class ModelFamily(Component):
    """The base class of model families.

    A minimal family has two lines, because its structure is discovered::

        class MyFamily(ModelFamily):
            name = "my-model"
            model_types = ("my_model",)

    `coupled_groups` declares the structure, or adjusts what `discover_graph` finds; `refresh` updates the counts that
    modules store. A family keeps no state but its settings.
    """

    kind: ClassVar[str] = "family"
    hook: ClassVar[str] = "llmpruner_model_families"
    model_types: ClassVar[tuple[str, ...]] = ()
    """The ``model_type`` values of ``config.json`` that this family matches."""
    extends: ClassVar[str | None] = None
    """Name of the family this one specialises; when both match a model, this one is used. Two families that extend the
    same one are of one rank: their `matches` must not take the same models."""
    chat_format: ClassVar[ChatFormat] = ALPACA
    """Replaces the tokenizer's chat template. Stanford Alpaca's, the default, is used only where there is none."""

    def register_models(self) -> None:
        """Register model classes that transformers lacks with its auto classes. Called whenever a model is loaded, so
        repeated calls must have no further effect. Does nothing by default."""

    def matches(self, config: PreTrainedConfig) -> bool:
        """Whether this family is for models of ``config``. Must be fast, and False when in doubt."""
        return config.model_type in self.model_types

    def coupled_groups(self, config: PreTrainedConfig) -> Sequence[CoupledGroup] | None:
        """The coupled groups of a model with this configuration, without its weights. None, the default: they are
        discovered by tracing the model. Groups that contradict its shapes are a `CouplingError`."""
        return None

    def refresh(self, model: PreTrainedModel) -> NotImplementedType | None:
        """Update attributes of modules after a cut, such as numbers of heads, by the shapes of parameters, in place.
        They are saved. Without a cut, it must change nothing. The default returns NotImplemented: the attributes that
        must follow a cut are found on a small model. A body of a docstring alone says that there are none."""
        return NotImplemented  # type: ignore[no-any-return]

    def stock_configs(self, config: PreTrainedConfig) -> Sequence[PreTrainedConfig]:
        """Configurations of other stock classes for a uniformly cut model that its own class cannot represent.
        ``config``: the candidate of its own class. The results are verified against the real shapes."""
        return ()


AUTO = "auto"


class AutoFamily(ModelFamily):
    """Used when no other family matches."""

    name = AUTO
    summary = "any decoder: structure is discovered by tracing, and every cut is verified on a small model"
