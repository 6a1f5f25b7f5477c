"""GGUF files for llama.cpp, Ollama and what builds on them: an exporter, a runtime and a recipe."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from llmpruner import (
    BenchSubject,
    ComponentSettings,
    Exporter,
    ExportTask,
    MissingExtraError,
    ModelError,
    NamedRecipe,
    Runtime,
    Session,
    Work,
    hookimpl,
)

OWN = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""Types that the package gguf quantises to; llama.cpp does the others."""
Quant = Annotated[
    Literal[
        "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs",
        "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
    ],
    BeforeValidator(lambda name: name.lower() if isinstance(name, str) else name),  # llama.cpp writes Q4_K_M
]  # fmt: skip


class GgufExporter(Exporter):
    """LLaMA, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, OLMoE, Gemma 1, 2 and 3 (text) as architectures of their own
    if all layers have the same sizes; LLaMA-like models (LLaMA, Mistral, Qwen2) with different widths and numbers of
    heads per layer as llama.cpp's ``deci``.

    Every tensor is read back, and if llama-cpp-python is installed, llama.cpp's logits and tokens are compared with the
    model's. A ``Modelfile`` for Ollama is written, too. Raises `UnsupportedModelError` with the reason for a model that
    GGUF can't state exactly.
    """

    name = "gguf"
    summary = "a file for llama.cpp and Ollama, with tokenizer and chat template; gguf.quant=q4_k_m … quantises"

    class Settings(ComponentSettings):
        type: Literal["auto", "f32", "f16", "bf16"] = Field(
            "auto", description="Type of matrices: f32, f16, bf16; auto: --dtype, or as the checkpoint stores them."
        )
        quant: Quant | None = Field(
            None,
            description="Quantise: q8_0, q5_1, q5_0, q4_1, q4_0; with llama-cpp-python also q6_k, q5_k_m, q4_k_m …",
        )
        pre: str | None = Field(
            None, description="llama.cpp's name for how the tokenizer splits text; by default found by its settings."
        )

    settings: Settings

    def check(self) -> None:
        if find_spec("gguf") is None:
            raise MissingExtraError("gguf", "gguf")
        quant = self.settings.quant
        if quant is not None and quant not in OWN and find_spec("llama_cpp") is None:
            raise ModelError(
                f"llama-cpp-python, which quantises to {quant}, is not installed; run: pip install llama-cpp-python "
                f"(it compiles llama.cpp, which takes many minutes), or take one of {', '.join(OWN)}"
            )

    def export(self, task: ExportTask) -> str:
        from .export import export_gguf

        return export_gguf(task, self.settings.type, self.settings.quant, self.settings.pre)


class LlamaCppRuntime(Runtime):
    """Runs GGUF files through the Python package of llama.cpp, with as many threads as torch has."""

    name = "llama-cpp"
    summary = "llama.cpp, for .gguf files"

    def check(self, subject: BenchSubject) -> None:
        for module, package, extra in (("llama_cpp", "llama-cpp-python", "llama-cpp"), ("gguf", "gguf", "gguf")):
            if find_spec(module) is None:
                raise MissingExtraError(package, extra)
        if subject.path is None or subject.path.suffix != ".gguf":
            raise ModelError(
                f"'{subject.ref}' is no .gguf file, which --runtime llama-cpp needs; write it with llmpruner export "
                "--to gguf"
            )

    def open(self, subject: BenchSubject) -> tuple[Session, Work]:
        from .bench import LlamaCppSession, gguf_work

        assert subject.path is not None
        work, dtype = gguf_work(subject.path)
        return LlamaCppSession(subject.path, dtype, subject), work


class GgufRecipe(NamedRecipe):
    name = "gguf"
    summary = "a model or a GGUF file becomes a smaller GGUF file of type q4_k_m"
    path = Path(__file__).with_name("gguf.yaml")


@hookimpl
def llmpruner_recipes() -> list[type]:
    return [GgufRecipe]


@hookimpl
def llmpruner_exporters() -> list[type]:
    return [GgufExporter]


@hookimpl
def llmpruner_runtimes() -> list[type]:
    return [LlamaCppRuntime]
