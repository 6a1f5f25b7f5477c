"""Runtimes for llama.cpp and vLLM. Imports no torch."""

from __future__ import annotations

from importlib.util import find_spec

from pydantic import Field

from ...component import ComponentSettings
from ...errors import MissingExtraError, ModelError
from ..runtime import BenchSubject, Runtime, Session, Work
from ..transformers_runtime import TransformersRuntime

GGUF = ".gguf"


class LlamaCppRuntime(Runtime):
    """Runs GGUF files through the Python package of llama.cpp (``pip install llama-cpp-python``), with as many threads
    as torch has."""

    name = "llama-cpp"
    summary = "llama.cpp, for .gguf files"

    def check(self, subject: BenchSubject) -> int:
        if find_spec("llama_cpp") is None:
            raise ModelError("llama_cpp is not installed; run: pip install llama-cpp-python")
        if find_spec("gguf") is None:
            raise MissingExtraError("gguf", "gguf")
        if subject.path is None or subject.path.suffix != GGUF:
            raise ModelError(
                f"'{subject.ref}' is no .gguf file, and --runtime llama-cpp runs no other; write one with llmpruner "
                "export --to gguf"
            )
        return subject.path.stat().st_size

    def open(self, subject: BenchSubject) -> tuple[Session, Work]:
        from .gguf_work import gguf_work
        from .llama_cpp_session import LlamaCppSession

        path = subject.path
        assert path is not None
        work, dtype = gguf_work(path)
        device = subject.device
        return LlamaCppSession(path, dtype, batch=subject.batch, length=subject.length, device=device), work


class VllmRuntime(TransformersRuntime):
    """Runs stock checkpoints in vLLM. A decoding step includes vLLM's scheduling; what is timed as prefill also
    predicts one token."""

    name = "vllm"
    summary = "vLLM, for checkpoints that it loads"

    class Settings(ComponentSettings):
        share: float = Field(0.3, gt=0, le=1, description="Share of the GPU's memory that each model may take.")
        eager: bool = Field(False, description="Run without compilation and CUDA graphs.")

    settings: Settings

    def check(self, subject: BenchSubject) -> int:
        if find_spec("vllm") is None:
            raise ModelError("vllm is not installed; run: pip install vllm")
        if subject.path is None or not subject.path.is_dir():
            raise ModelError(f"'{subject.ref}' is no checkpoint directory, and --runtime vllm runs no other")
        return super().check(subject)

    def open(self, subject: BenchSubject) -> tuple[Session, Work]:
        from ..transformers_runtime import work_of
        from .vllm_session import VllmSession

        # transformers' model is needed for its sizes alone, and freed before vLLM loads its own.
        loaded = subject.load()
        work, vocabulary = work_of(loaded.model, loaded.graph), int(loaded.model.config.get_text_config().vocab_size)
        del loaded
        return VllmSession(subject, vocabulary, share=self.settings.share, eager=self.settings.eager), work
