"""What Vicuna adds to LLaMA: its name and its prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmpruner_llama.family import LlamaFamily

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class VicunaFamily(LlamaFamily):
    """Vicuna v1.1 to v1.5. Its config says only ``llama``, so the checkpoint's own name decides, or ``--family``."""

    name = "vicuna"
    extends = "llama"

    def matches(self, config: PreTrainedConfig) -> bool:
        return super().matches(config) and "vicuna" in str(getattr(config, "name_or_path", "")).lower()

    def format_prompt(self, instruction: str, input: str = "") -> str:
        question = f"{instruction}\n{input}" if input else instruction
        return f"{SYSTEM} USER: {question} ASSISTANT:"
