"""ModelFamily: the structure of one model architecture, what must follow a cut, and its text format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from ..structure.coupling import LAYER, CoupledGroup, CouplingGraph
from ..structure.kept import renamed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..structure.kept import Kept


class ModelFamily:
    """What a plugin gives for one model architecture.

    The smallest useful family is two lines, because structure is discovered automatically::

        class MyFamily(ModelFamily):
            name = "my-model"
            model_types = ("my_model",)

    Override `coupled_groups` to declare the structure, or to adjust what ``super().coupled_groups(config)`` discovers.
    Override `refresh` to set the counts that modules store; where it is not overridden, what must follow a cut is found
    on a small model. A family is created without arguments and keeps no state.
    """

    name: ClassVar[str] = ""
    """What ``--family`` takes; lower case, unique over all plugins."""
    model_types: ClassVar[tuple[str, ...]] = ()
    """The ``model_type`` values of ``config.json`` that this family understands."""
    extends: ClassVar[str | None] = None
    """Name of the family this one specialises; when both match a model, this one wins."""
    protected_layers: ClassVar[tuple[float, float]] = (0.1, 0.1)
    """Share of layers at either end that is not pruned unless the user selects layers: the first and last
    three of 30, as LLM-Pruner protects layers 0–3 and 30–31 of LLaMA-7B's 32."""

    answer_separator: ClassVar[str | None] = None
    """What stands between prompt and answer in training text; None: a blank, unless either side brings white space."""

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

    def format_text(self, text: str) -> str:
        """Free text as the model reads it, for data without prompts: unchanged, unless a model needs a frame."""
        return text

    def format_prompt(self, instruction: str, input: str = "") -> str:
        """The prompt that recovery trains on and ``generate --chat`` uses: Alpaca's, unless overridden."""
        return alpaca_prompt(instruction, input)

    def format_conversation(self, exchanges: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
        """Questions with their answers as recovery trains on them: (prompt, answer) pairs whose texts follow one
        another. An answer that brings its own end-of-sequence token gets no second one."""
        return [self.training_pair(question, answer) for question, answer in exchanges]

    def training_pair(self, instruction: str, answer: str, input: str = "") -> tuple[str, str]:
        """Prompt and answer as recovery joins them, with `answer_separator` at the head of the answer."""
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
