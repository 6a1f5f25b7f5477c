"""ModelFamily: the structure of one model architecture, what must follow a cut, and its text format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from ..component import Component
from ..structure.coupling import LAYER, CoupledGroup, CouplingGraph
from ..structure.kept import renamed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..structure.kept import Kept


class ModelFamily(Component):
    """What a plugin gives for one model architecture.

    The smallest useful family is two lines, because structure is discovered automatically::

        class MyFamily(ModelFamily):
            name = "my-model"
            model_types = ("my_model",)

    Override `coupled_groups` to declare the structure, or to adjust what ``super().coupled_groups(config)`` discovers.
    Override `refresh` to set the counts that modules store; where it is not overridden, what must follow a cut is found
    on a small model. A family keeps no state but its settings.
    """

    kind: ClassVar[str] = "family"
    model_types: ClassVar[tuple[str, ...]] = ()
    """The ``model_type`` values of ``config.json`` that this family understands."""
    extends: ClassVar[str | None] = None
    """Name of the family this one specialises; when both match a model, this one wins."""
    protected_layers: ClassVar[tuple[float, float]] = (0.1, 0.1)
    """Share of layers at either end that is not pruned unless the user selects layers: the first and last
    three of 30, as LLM-Pruner protects layers 0–3 and 30–31 of LLaMA-7B's 32."""
    answer_separator: ClassVar[str | None] = None
    """Text between prompt and answer in `training_pair`; None: a blank, unless there is white space already."""

    def register_models(self) -> None:
        """Register model classes that transformers lacks with its auto classes. Called whenever a model is loaded: it
        must be safe to call twice. Does nothing by default."""

    def matches(self, config: PreTrainedConfig) -> bool:
        """Whether this family understands ``config``. Must be cheap, and false when in doubt."""
        return config.model_type in self.model_types

    def coupled_groups(self, config: PreTrainedConfig) -> Sequence[CoupledGroup]:
        """The coupled groups of a model with this configuration, without its weights.

        The default discovers them by tracing the model on the meta device.
        """
        from ..discovery.groups import discover_groups

        return discover_groups(config)

    def refresh(self, model: PreTrainedModel, counts: Mapping[str, int]) -> None:
        """Set attributes that must follow a cut, such as the number of heads. Parameters are already cut when this is
        called. A family whose modules need no such attribute overrides it with a docstring alone: nothing is searched
        then.

        ``counts``: group name → units kept, for every group that lost units (layers already renumbered).
        Attributes changed here are found by comparison and saved with the checkpoint.
        """

    def follow(self, model: PreTrainedModel, graph: CouplingGraph, kept: Kept) -> None:
        """Make everything that is no parameter follow a cut; surgery calls it last. ``graph``: before the cut.

        Where `refresh` is not overridden, what must follow (head counts, slopes) is found on a small model, once in a
        process for each architecture and kind. Raises `UnsupportedModelError` when a kind of unit cannot be cut exactly
        in this architecture.
        """
        if self.is_discovered:
            from ..checkpoints.shim import stock_config
            from ..oracle.follow import apply
            from ..oracle.rules import rules_of

            kinds = {graph.by_name[name].kind for name in kept} - {LAYER}
            apply(model, graph, kept, rules_of(stock_config(model), kinds, self))
        else:
            names = renamed(graph, kept)
            self.refresh(model, {names[name]: len(units) for name, units in kept.items() if name in names})

    @property
    def is_discovered(self) -> bool:
        """Whether what must follow a cut is left to discovery: `refresh` is not overridden. Declaring groups does not
        change that."""
        return type(self).refresh is ModelFamily.refresh

    def stock_configs(self, config: PreTrainedConfig) -> Sequence[PreTrainedConfig]:
        """Other stock configurations that may describe a uniformly cut model that its own class refuses.

        ``config`` is the candidate that was refused or did not fit. Whatever is returned is verified against
        the real shapes before it is used.
        """
        del config
        return ()

    @property
    def has_own_format(self) -> bool:
        """Whether the family overrides `format_prompt` or `format_conversation`. If so, the chat template of a
        tokenizer is not used (see `llmpruner.families.chat`)."""
        cls = type(self)
        overrides_prompt = cls.format_prompt is not ModelFamily.format_prompt
        return overrides_prompt or cls.format_conversation is not ModelFamily.format_conversation

    def format_text(self, text: str) -> str:
        """Text that the model is to write without a chat format around it: unchanged, unless a model needs special
        tokens in front of it."""
        return text

    def format_prompt(self, instruction: str, input: str = "") -> str:
        """The prompt for one instruction. Used where the tokenizer has no chat template, or where overridden: in
        recovery and by ``generate --chat``. The default is Stanford Alpaca's format."""
        return alpaca_prompt(instruction, input)

    def format_system(self, system: str) -> str:
        """A system message, as it stands before the first prompt of a conversation."""
        return f"{system}\n\n"

    def format_conversation(
        self, exchanges: Sequence[tuple[str, str]], system: str | None = None
    ) -> Sequence[tuple[str, str]]:
        """A conversation as training text: (prompt, answer) pairs, whose texts are joined in their order.

        ``exchanges``: (question, answer) pairs. ``system``: the system message. An end-of-sequence token is added to
        every answer that does not end with one.
        """
        pairs = [self.training_pair(question, answer) for question, answer in exchanges]
        if system is not None:
            pairs[0] = (self.format_system(system) + pairs[0][0], pairs[0][1])
        return pairs

    def training_pair(self, instruction: str, answer: str, input: str = "") -> tuple[str, str]:
        """The prompt for one instruction, and the answer with `answer_separator` in front: joined, they are what
        recovery trains on."""
        prompt = self.format_prompt(instruction, input)
        gap = self.answer_separator
        if gap is None:
            gap = " " if prompt and not prompt[-1].isspace() and not answer[:1].isspace() else ""
        return prompt, gap + answer


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The instruction format of Stanford Alpaca, which the paper's recovery uses."""
    if input:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n"
    )
