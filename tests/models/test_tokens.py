"""Token ids: in bounded time without blanks, padded by a token that the model knows, no more than the model reads."""

import json

import pytest
import tiny_models
import torch
from tokenizers.processors import TemplateProcessing
from transformers import MptConfig, MptForCausalLM, OPTConfig, OPTForCausalLM

import llmpruner
from llmpruner import ChatFormat, DataError
from llmpruner.calibration.base import SampleTask
from llmpruner.calibration.chat import labelled, training_texts
from llmpruner.calibration.conversations import Conversation, Instruction
from llmpruner.calibration.windows import windows
from llmpruner.calibration.written import answered
from llmpruner.evaluation.perplexity import perplexity
from llmpruner.models.family import AutoFamily
from llmpruner.models.generation import generate, positions_of, table_of
from llmpruner.models.tokenizer import LONGEST_WORD, ids_to_continue, padding_id, tokens_of, with_padding


class Recording:
    """A tokenizer that keeps the texts that it was given."""

    def __init__(self):
        self.texts: list[str] = []
        self.tokenizer = tiny_models.tokenizer()

    def __call__(self, text, **options):
        self.texts.append(text)
        return self.tokenizer(text, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("text", ["", "a", tiny_models.TEXT * 20, "x" * LONGEST_WORD, "\n" * 9000])
def test_text_with_blanks_is_encoded_as_one_string(text):
    tokenizer = Recording()
    assert tokens_of(tokenizer, text) == tiny_models.tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.texts == [text]


def test_runs_without_a_blank_are_cut_and_nothing_else():
    tokenizer, long = Recording(), "ab" * 3500
    tokens_of(tokenizer, f"one {long} two {long}")
    assert "".join(tokenizer.texts) == f"one {long} two {long}"
    assert [len(text) for text in tokenizer.texts] == [2004, 2000, 2000, 3005, 2000, 2000, 1000]


def test_a_long_text_without_blanks_is_measured_and_sampled_in_pieces():
    tokenizer, text = Recording(), "ab" * 20_000
    found = perplexity(tiny_models.llama(), tokenizer, text, window=32, tokens=64)
    assert found.tokens == 64 and max(map(len, tokenizer.texts)) == LONGEST_WORD
    tokenizer = Recording()
    task = SampleTask(None, tokenizer, "x", samples=3, length=128, seed=0, family=None)
    assert windows([text], task).shape == (3, 128)
    assert max(map(len, tokenizer.texts)) == LONGEST_WORD


def test_a_prompt_that_the_model_cannot_read_is_refused():
    model, tokenizer = tiny_models.llama(), Recording()
    with pytest.raises(DataError, match="the prompt has 20,000 tokens, and the model reads 512; shorten it"):
        generate(model, tokenizer, "z" * 20_000)
    assert generate(model, tokenizer, "z" * 512, max_new_tokens=1) is not None


def test_an_end_of_sequence_that_the_tokenizer_adds_is_there_once_and_never_after_a_prompt():
    """As LLaMA's with ``add_eos_token``. A format without an end of sequence (``eos_after`` none) gets none."""
    tokenizer = tiny_models.tokenizer()
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", start), ("</s>", end)]
    )
    assert [tokenizer("ab")["input_ids"][place] for place in (0, -1)] == [start, end]
    assert end not in ids_to_continue(tokenizer, "ab", special=True)
    assert ids_to_continue(tokenizer, "ab</s>", special=True).count(end) == 1
    talk = Conversation((("q", "a"), ("q", "a")))
    for after, ends in (("every", 2), ("last", 1), ("none", 0)):

        class Format(ChatFormat):
            eos_after = after

        class Family(AutoFamily):
            chat_format = Format()

        (text,) = training_texts(talk, Family(), tokenizer)
        row = labelled(text, tokenizer, 512)
        assert row["labels"].count(end) == row["input_ids"].count(end) == ends
        assert (row["input_ids"][-1] == end) is (ends > 0)
        (text,) = training_texts(Instruction("q", "a"), Family(), tokenizer)
        row = labelled(text, tokenizer, 512)
        assert row["labels"].count(end) == row["input_ids"].count(end) == min(ends, 1)


@pytest.fixture
def padded():
    """A tokenizer whose padding token was added without resizing the model, as in many derivatives of Llama."""
    model, tokenizer = tiny_models.llama(), tiny_models.tokenizer()
    rows = model.get_input_embeddings().num_embeddings
    tokenizer.add_tokens([f"<extra {n}>" for n in range(rows - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= rows
    return model, tokenizer


def test_another_token_pads_where_the_padding_token_has_no_row(padded):
    model, tokenizer = padded
    assert padding_id(tokenizer, model) == tokenizer.eos_token_id
    assert padding_id(tokenizer, model, [None, 10**6, 7]) == 7
    other = with_padding(tokenizer, model)
    assert (other.pad_token_id, tokenizer.pad_token) == (tokenizer.eos_token_id, "[PAD]")
    assert with_padding(other, model) is other
    numbers = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    assert len(answered(model, tokenizer, [[5, 6, 7], [8]], 4, numbers)) == 2


def test_a_model_without_a_row_for_the_padding_token_is_recovered(padded, tmp_path):
    for part in padded:
        part.save_pretrained(tmp_path / "model")
    rows = [{"prompt": "Question", "completion": "It is so. " * (1 + n % 3)} for n in range(8)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    llmpruner.prune(tmp_path / "model", ratio=0.2, importance="l1", compensate="none", output=tmp_path / "pruned")
    llmpruner.recover(
        tmp_path / "pruned", data=str(tmp_path / "d.jsonl"), output=tmp_path / "out", strategy="full", max_steps=3,
        batch_size=4, micro_batch_size=4,
    )  # fmt: skip
    assert llmpruner.load(tmp_path / "out").tokenizer.pad_token == "[PAD]"


MPT = {"vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 32}
OPT = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
    "word_embed_proj_dim": 32, "max_position_embeddings": 32,
}  # fmt: skip
MODELS = {
    "gpt2": tiny_models.gpt2,
    "mpt": lambda: MptForCausalLM(MptConfig(**MPT)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT)),
}


@pytest.mark.parametrize("name", MODELS)
def test_as_many_tokens_as_the_model_reads(name):
    model = MODELS[name]().eval()
    assert positions_of(model.config) == table_of(model.config) == 32
    rotary = tiny_models.llama().config
    assert positions_of(rotary) == 512 and table_of(rotary) is None
    ids = torch.arange(10, 43)[None]
    model(ids[:, :32], use_cache=False)
    with pytest.raises((RuntimeError, IndexError)):
        model(ids, use_cache=False)
