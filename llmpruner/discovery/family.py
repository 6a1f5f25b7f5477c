"""ModelFamily: what the stages need to know about one model architecture; and AutoFamily, for all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from ..component import Component
from ..structure.coupling import CoupledGroup, CouplingGraph

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..structure.kept import Kept


class ModelFamily(Component):
    """The base class of model families.

    A minimal family has two lines, because its structure is discovered::

        class MyFamily(ModelFamily):
            name = "my-model"
            model_types = ("my_model",)

    Override `coupled_groups` to declare the structure, or to adjust what ``super().coupled_groups(config)`` discovers.
    Override `refresh` to update the counts that modules store; if it is not overridden, the attributes that must change
    with a cut are found on a small model. A family keeps no state but its settings.
    """

    kind: ClassVar[str] = "family"
    hook: ClassVar[str] = "llmpruner_model_families"
    model_types: ClassVar[tuple[str, ...]] = ()
    """The ``model_type`` values of ``config.json`` that this family matches."""
    extends: ClassVar[str | None] = None
    """Name of the family this one specialises; when both match a model, this one is used. Two families that extend the
    same one are of one rank: their `matches` must not take the same models."""
    answer_separator: ClassVar[str | None] = None
    """Text between a prompt and its answer; None: a blank, unless one of them has white space there."""
    eos_after: ClassVar[Literal["every", "last", "none"]] = "every"
    """Which answers of a conversation get an end-of-sequence token, unless they have one. Not for chat templates."""
    stop_text: ClassVar[str | None] = None
    """Text before which an answer in the chat format ends, besides the end-of-sequence token."""

    def register_models(self) -> None:
        """Register model classes that transformers lacks with its auto classes. Called whenever a model is loaded, so
        repeated calls must have no further effect. Does nothing by default."""

    def matches(self, config: PreTrainedConfig) -> bool:
        """Whether this family is for models of ``config``. Must be fast, and False when in doubt."""
        return config.model_type in self.model_types

    def coupled_groups(self, config: PreTrainedConfig) -> Sequence[CoupledGroup]:
        """The coupled groups of a model with this configuration, without its weights. The default traces the model, and
        raises `UnsupportedModelError` where that fails. Groups that contradict its shapes are a `CouplingError`."""
        from .groups import discover_graph

        return discover_graph(config).groups

    def refresh(self, model: PreTrainedModel) -> None:
        """Update attributes of modules after a cut, such as numbers of heads, by the shapes of parameters, in place.
        They are saved. If there are none, override it with a docstring alone, which avoids the search for them."""

    def follow(self, model: PreTrainedModel, graph: CouplingGraph, kept: Kept) -> None:
        """Update attributes of modules and tables after a cut, in place. ``graph``: before the cut. ``kept``: group
        name → units kept. Unless `refresh` is overridden, they are found on a small model, once in a process for each
        architecture and kind. Raises `UnsupportedModelError` when a kind of unit cannot be cut exactly."""
        if self.is_discovered:
            from .verify import with_rules

            with_rules(self, model, {graph.by_name[name].kind for name in kept}).follow(model, graph, kept)
        else:
            self.refresh(model)

    @property
    def is_discovered(self) -> bool:
        """Whether `refresh` is not overridden, so that the attributes to update are found on a small model."""
        return type(self).refresh is ModelFamily.refresh

    @property
    def declares_groups(self) -> bool:
        """Whether `coupled_groups` is overridden."""
        return type(self).coupled_groups is not ModelFamily.coupled_groups

    def stock_configs(self, config: PreTrainedConfig) -> Sequence[PreTrainedConfig]:
        """Configurations of other stock classes for a uniformly cut model that its own class cannot represent.
        ``config``: the candidate of its own class. The results are verified against the real shapes."""
        del config
        return ()

    @property
    def has_own_format(self) -> bool:
        """Whether `format_prompt` or `format_conversation` is overridden, and so used instead of the chat template."""
        cls, base = type(self), ModelFamily
        return cls.format_prompt is not base.format_prompt or cls.format_conversation is not base.format_conversation

    def format_text(self, text: str) -> str:
        """Training text without a chat format: unchanged, unless a model needs special tokens before it."""
        return text

    def format_prompt(self, question: str) -> str:
        """The prompt for one question, which `format_conversation` uses; by default in Stanford Alpaca's format."""
        return alpaca_prompt(question)

    def format_system(self, system: str) -> str:
        """The text of a system message, before the first prompt of a conversation."""
        return f"{system}\n\n"

    def format_conversation(
        self, exchanges: Sequence[tuple[str, str]], system: str | None = None
    ) -> Sequence[tuple[str, str]]:
        """A conversation as (prompt, answer) pairs, whose texts are joined: what is trained on, and up to the last
        prompt what ``generate --chat`` asks. ``exchanges``: (question, answer) pairs; earlier ones may get another form
        than the last. ``system``: the system message. The caller adds end-of-sequence tokens, see `eos_after`."""
        pairs = []
        for question, answer in exchanges:
            prompt, gap = self.format_prompt(question), self.answer_separator
            if gap is None:
                gap = " " if prompt and not prompt[-1].isspace() and not answer[:1].isspace() else ""
            pairs.append((prompt, gap + answer))
        if system is not None:
            pairs[0] = (self.format_system(system) + pairs[0][0], pairs[0][1])
        return pairs


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The instruction format of Stanford Alpaca, which the paper's recovery uses."""
    paired = ", paired with an input that provides further context" if input else ""
    context = f"### Input:\n{input}\n\n" if input else ""
    return (
        f"Below is an instruction that describes a task{paired}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{context}### Response:\n"
    )


AUTO = "auto"


class AutoFamily(ModelFamily):
    """Used when no other family matches."""

    name = AUTO
    summary = "any decoder: structure is discovered by tracing, and every cut is verified on a small model"
