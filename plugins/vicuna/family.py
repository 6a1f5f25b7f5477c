"""The families of Vicuna: LLaMA with a conversation format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from llmpruner_llama.family import LlamaFamily

from .conversation import V0_ZERO_SHOT, V1_1, Template, Turn
from .recognition import Version, version_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class VicunaFamily(LlamaFamily):
    """Vicuna v1.1, v1.3 and v1.5."""

    name = "vicuna"
    summary = "Vicuna v1.1, v1.3 and v1.5: LLaMA with a conversation format"
    extends = "llama"
    version: ClassVar[Version] = "v1"
    template: ClassVar[Template] = V1_1

    def matches(self, config: PreTrainedConfig) -> bool:
        return super().matches(config) and version_of(config) == self.version

    def format_prompt(self, instruction: str, input: str = "") -> str:
        return self.template.prompt(f"{instruction}\n{input}" if input else instruction)

    def format_conversation(
        self, exchanges: Sequence[tuple[str, str]], system: str | None = None
    ) -> list[tuple[str, str]]:
        """(prompt, answer) pairs of Vicuna's training text. ``system`` replaces Vicuna's system message."""
        template = self.template if system is None else replace(self.template, system=system)
        turns = [turn for question, answer in exchanges for turn in (Turn("human", question), Turn("gpt", answer))]
        return template.exchanges(turns)

    def training_pair(self, instruction: str, answer: str, input: str = "") -> tuple[str, str]:
        """With the closing text of the answer."""
        prompt, answered = super().training_pair(instruction, answer, input)
        return prompt, answered + self.template.closing[1]


class VicunaV0Family(VicunaFamily):
    """Vicuna v0, the first release: another conversation format, and one more token."""

    name = "vicuna-v0"
    summary = "Vicuna v0, the first release: another conversation format, and one more token"
    version = "v0"
    template = V0_ZERO_SHOT
    stop_text = V0_ZERO_SHOT.stop
    eos_after = "none"
