"""A tiny tokenizer and tiny models, made on the spot."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

TEXT = (
    "The quick brown fox jumps over the lazy dog. A model predicts the next token from those before it. "
    "Paris is the capital of France, and Rome is the capital of Italy. Two and two make four. "
    "### Instruction: Below is an instruction that describes a task. ### Response: "
) * 4


def tokenizer(text: str = TEXT) -> Any:
    """A copy of its own for each caller, as some libraries add a padding token to what they are given. ``text``: that
    it is trained on."""
    return copy.deepcopy(_trained(text))


@cache
def _trained(text: str) -> Any:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    base = ByteLevelBPETokenizer()
    base.train_from_iterator([text], vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=base._tokenizer, bos_token="<s>", eos_token="</s>")


def gpt2(positions: int = 32) -> Any:
    """With a table of positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=positions)).eval()


def llama(*, layers: int = 2, tied: bool = False, seed: int = 0, **changes: Any) -> Any:
    """``changes``: of the configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    values = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
        "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": tied,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**values, **changes})).eval()


def remembered(found_for: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``found_for`` a configuration, once in a process: many tests open the same few models."""
    known: dict[Any, Any] = {}

    def remembering(config: Any) -> Any:
        if not type(config).__module__.startswith(("transformers.models.", "llmpruner_chatglm.")):
            return found_for(config)  # a class of a test, which may change it
        values = config.to_dict()
        values.pop("_name_or_path", None)
        key = type(config), repr(values)
        if key not in known:
            known[key] = found_for(config)
        return known[key]

    return remembering
