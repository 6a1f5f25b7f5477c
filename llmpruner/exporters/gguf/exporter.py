"""Export as a GGUF file, for llama.cpp, Ollama and what builds on them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ...component import ComponentSettings
from ...errors import MissingExtraError
from ..base import Exporter, ExportTask

Type = Literal["auto", "f32", "f16", "bf16"]
Quant = Literal[
    "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs",
    "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
]  # fmt: skip


def _in_small_letters(value: Any) -> Any:
    """llama.cpp writes the names in capitals."""
    return value.lower() if isinstance(value, str) else value


class GgufExporter(Exporter):
    """LLaMA, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, OLMoE, Gemma 1, 2 and 3 (text) as architectures of their own
    where all layers have the same sizes; LLaMA-like models (LLaMA, Mistral, Qwen2) with different widths and numbers of
    heads per layer as llama.cpp's ``deci``.

    Before the file gets its name, its logits are computed from the file alone and compared with the model's, and by
    llama.cpp as well where llama-cpp-python is installed. A ``Modelfile`` for Ollama lies beside it. Raises
    `UnsupportedModelError` with the reason for a model that GGUF cannot state exactly.
    """

    name = "gguf"
    summary = "one file for llama.cpp and Ollama, with tokenizer and chat template; --quant q4_k_m and others quantise"

    class Settings(ComponentSettings):
        type: Type = Field(
            "auto", description="Type of matrices: f32, f16, bf16; auto: --dtype, or as the checkpoint stores them."
        )
        quant: Annotated[Quant | None, BeforeValidator(_in_small_letters)] = Field(
            None, description="Quantise with llama.cpp: q8_0, q6_k, q5_k_m, q4_k_m … (needs llama-cpp-python)."
        )
        pre: str | None = Field(
            None, description="llama.cpp's name for how the tokenizer splits text; by default found by its settings."
        )

    settings: Settings

    def check(self) -> None:
        if find_spec("gguf") is None:
            raise MissingExtraError("gguf", "gguf")
        if self.settings.quant is not None:
            from .runtime import check_installed

            check_installed()

    def export(self, task: ExportTask) -> str:
        self.check()
        from .run import export_gguf

        return export_gguf(task, self.settings.type, self.settings.quant, self.settings.pre)
