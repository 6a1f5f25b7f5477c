"""Checkpoints that vLLM runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm import LLM, SamplingParams

from ..runtime import Session

if TYPE_CHECKING:
    import torch

    from ..runtime import BenchSubject


class VllmSession(Session):
    """vLLM generates whole texts. The prefill is a text of one token; decoding is a longer text after the same prompt,
    whose keys and values vLLM has kept."""

    def __init__(self, subject: BenchSubject, vocabulary: int, *, share: float, eager: bool) -> None:
        self.vocabulary = vocabulary
        self.dtype = str(subject.dtype).removeprefix("torch.")
        self._llm: Any = LLM(
            model=str(subject.path),
            dtype=self.dtype,
            max_model_len=subject.length + 1,
            max_num_seqs=subject.batch,
            gpu_memory_utilization=share,
            enforce_eager=eager,
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
        )

    def prefill(self, tokens: torch.Tensor) -> None:
        self._prompts = [{"prompt_token_ids": row} for row in tokens.tolist()]
        self._generate(1)

    def decode(self, count: int) -> None:
        self._generate(count + 1)

    def close(self) -> None:
        del self._llm

    def _generate(self, count: int) -> None:
        options = SamplingParams(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False)
        self._llm.generate(self._prompts, options, use_tqdm=False)
