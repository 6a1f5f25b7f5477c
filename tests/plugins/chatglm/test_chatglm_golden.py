"""Outputs of the original code, reproduced. The data was made by running it on tiny random weights; see cases.json."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from chatglm_tiny import DATA
from llmpruner_chatglm import ChatGLMFamily, ChatGLMReader
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

# The tied model's larger weights amplify rounding.
TOLERANCE = {"chatglm_v1": 2e-5, "chatglm_v1/tied": 1e-4, "chatglm2": 2e-5, "chatglm3": 2e-5}
CASES = [
    (folder, case) for folder in TOLERANCE for case in json.loads((DATA / folder / "cases.json").read_text())["cases"]
]
LOGITS = [(f, c) for f, c in CASES if "greedy" not in c]
GREEDY = [(f, c) for f, c in CASES if "greedy" in c]


@cache
def model(folder: str) -> Any:
    if folder.startswith("chatglm_v1"):
        ChatGLMFamily().register_models()
        return AutoModelForCausalLM.from_pretrained(DATA / folder, dtype=torch.float32)
    return ChatGLMReader().read_model(DATA / folder, torch.float32)


@cache
def tensors(folder: str) -> dict[str, torch.Tensor]:
    return load_file(DATA / folder / "cases.safetensors")


def case_of(folder: str, name: str) -> dict[str, torch.Tensor]:
    return {k.split(".")[1]: v for k, v in tensors(folder).items() if k.split(".")[0] == name}


def padding_mask(case: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the first generation, the data has the masks of its original tokenizer: (B, 1, T, S), True where masked."""
    mask = case["attention_mask"]
    return mask if mask.dim() == 2 else (~mask[:, 0, -1]).long()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("folder", "name"), LOGITS)
def test_logits_of_the_original(folder: str, name: str, attention: str) -> None:
    case = case_of(folder, name)
    model(folder).set_attn_implementation(attention)
    assert model(folder).config._attn_implementation == attention
    mask = padding_mask(case)
    for arguments in ({"attention_mask": mask}, *([{}] if bool(mask.all()) else [])):
        with torch.no_grad():
            logits = model(folder)(case["input_ids"], **arguments).logits
        assert (logits - case["logits"])[mask == 1].abs().max() <= TOLERANCE[folder]


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize(("folder", "name"), GREEDY)
def test_greedy_ids_of_the_original(folder: str, name: str, options: dict[str, Any]) -> None:
    case = case_of(folder, name)
    length, new = case["input_ids"].shape[1], case["new_tokens"].shape[1]
    ids = model(folder).generate(
        case["input_ids"], attention_mask=padding_mask(case), max_new_tokens=new, do_sample=False, **options
    )
    assert torch.equal(ids[:, length:], case["new_tokens"])
