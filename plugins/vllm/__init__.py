"""vLLM as a runtime of ``bench``."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llmpruner import BenchSubject, ComponentSettings, ModelError, Runtime, Session, Work, hookimpl, work_of

if TYPE_CHECKING:
    import torch


class VllmRuntime(Runtime):
    """Runs stock checkpoints in vLLM. A decoding step includes vLLM's scheduling; what is timed as prefill also
    predicts one token."""

    name = "vllm"
    summary = "vLLM, for checkpoints that it loads"

    class Settings(ComponentSettings):
        share: float = Field(0.3, gt=0, le=1, description="Share of the GPU's memory that each model may take.")
        eager: bool = Field(False, description="Run without compilation and CUDA graphs.")

    settings: Settings

    def check(self, subject: BenchSubject) -> None:
        if find_spec("vllm") is None:
            raise ModelError("vllm is not installed; run: pip install vllm")
        if subject.path is None or not subject.path.is_dir():
            raise ModelError(f"'{subject.ref}' is no checkpoint directory, which --runtime vllm needs")

    def open(self, subject: BenchSubject) -> tuple[Session, Work]:
        import torch

        # transformers' model is needed for its sizes alone, and freed before vLLM loads its own.
        loaded = subject.load()
        work, dtype = work_of(loaded.network, loaded.graph), str(loaded.network.dtype).removeprefix("torch.")
        vocabulary = int(loaded.network.config.get_text_config().vocab_size)
        del loaded
        torch.cuda.empty_cache()  # vLLM wants its share of the memory to be free
        return VllmSession(subject, vocabulary, dtype, self.settings), work


class VllmSession(Session):
    """vLLM generates whole texts. The prefill is a text of one token; decoding is a longer text after the same prompt,
    whose keys and values vLLM has kept."""

    def __init__(self, subject: BenchSubject, vocabulary: int, dtype: str, settings: VllmRuntime.Settings) -> None:
        from vllm import LLM

        self.vocabulary, self.dtype = vocabulary, dtype
        self._llm: Any = LLM(
            model=str(subject.path),
            dtype=self.dtype,
            max_model_len=subject.length + 1,
            max_num_seqs=subject.batch,
            gpu_memory_utilization=settings.share,
            enforce_eager=settings.eager,
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
        )

    def start(self) -> None:
        # Prompts of other lengths begin with the same tokens.
        self._llm.reset_prefix_cache()

    def prefill(self, tokens: torch.Tensor) -> None:
        self._prompts = [{"prompt_token_ids": row} for row in tokens.tolist()]
        self._generate(1)

    def decode(self, count: int) -> None:
        self._generate(count + 1)

    def close(self) -> None:
        del self._llm

    def _generate(self, count: int) -> None:
        from vllm import SamplingParams

        options = SamplingParams(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False)
        self._llm.generate(self._prompts, options, use_tqdm=False)


@hookimpl
def llmpruner_runtimes() -> list[type]:
    return [VllmRuntime]
