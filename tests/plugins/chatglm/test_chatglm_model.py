"""Outputs of the original code, reproduced (made by running it on tiny random weights; see cases.json); and what it has
no cases of: positions, visibility, padding, beams, losses."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from chatglm_tiny import DATA, GMASK, MASK, PAD, SOP, prompts, tiny_config, tiny_model
from llmpruner_chatglm import ChatGLMFamily, ChatGLMReader
from llmpruner_chatglm.modeling_chatglm import Layout
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


# What the original has no cases of


@pytest.mark.parametrize(
    ("row", "positions"),
    [
        ([MASK, 7, GMASK, SOP, 9], [[0, 1, 2, 2, 2], [0, 0, 0, 1, 2]]),
        ([7, 8, 9], [[0, 0, 0], [1, 2, 3]]),
    ],
    ids=["gmask before mask", "without sop, all is an answer"],
)
def test_positions_that_no_case_of_the_original_code_has(row: list[int], positions: list[list[int]]) -> None:
    layout = Layout.of(torch.tensor([row]), None, tiny_config("chatglm"))
    assert layout.position_ids(torch.arange(len(row))).tolist() == [positions]


def test_text_without_sop_is_scored_without_looking_ahead() -> None:
    model = tiny_model("chatglm", "sdpa")
    one, other = torch.tensor([[7, 8, 9, 10]]), torch.tensor([[7, 8, 9, 33]])
    with torch.no_grad():
        assert (model(one).logits[:, :3] - model(other).logits[:, :3]).abs().max() < 1e-6


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_on_the_right_changes_nothing(attention: str) -> None:
    model = tiny_model("chatglm", attention)
    padded = torch.tensor([[7, 9, GMASK, SOP, 20, 21, PAD, PAD]])
    with torch.no_grad():
        found = model(padded, attention_mask=(padded != PAD).long()).logits[:, :6]
        assert (found - model(padded[:, :6]).logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}], ids=str
)
def test_beams_and_copies_agree_with_and_without_cache(options: dict[str, Any]) -> None:
    model = tiny_model("chatglm", "sdpa")
    ids, mask = prompts()
    common = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, **options}
    expected = model.generate(ids, use_cache=False, **common)
    assert torch.equal(model.generate(ids, **common), expected)


def test_loss_is_of_the_labelled_tokens_of_answers_shifted_by_one() -> None:
    """The attention of the context is bidirectional: each token sees the one that it would predict."""
    model, loss = tiny_model("chatglm"), torch.nn.functional.cross_entropy
    ids, mask = prompts()
    plain = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        for labels in (ids, torch.where(torch.arange(8) >= 6, ids, -100)):
            output = model(ids, attention_mask=mask, labels=labels)
            expected = loss(output.logits[:, 5:7].flatten(0, 1), ids[:, 6:].flatten())
            assert output.loss == pytest.approx(float(expected), abs=1e-5)
        output = model(plain, labels=plain)
        assert output.loss == pytest.approx(float(loss(output.logits[0, :-1], plain[0, 1:])), abs=1e-5)
