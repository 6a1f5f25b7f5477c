"""Token ids: in bounded time without blanks, padded by a token that the model knows, no more than the model reads; and
generated text: greedy and sampled, where it ends, and the fast attention of one token."""

import json
import warnings
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from tokenizers.processors import TemplateProcessing
from transformers import MptConfig, MptForCausalLM, OPTConfig, OPTForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import llmpruner
from llmpruner import ChatFormat, DataError
from llmpruner.calibration.base import SampleTask
from llmpruner.calibration.chat import labelled, training_texts
from llmpruner.calibration.conversations import Conversation, Instruction
from llmpruner.calibration.windows import windows
from llmpruner.calibration.written import answered
from llmpruner.evaluation.perplexity import perplexity
from llmpruner.models.family import AutoFamily
from llmpruner.models.generation import fast_one_token_attention, generate, positions_of, table_of
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


# Generation


SDPA = ALL_ATTENTION_FUNCTIONS["sdpa"]


@pytest.fixture
def model():
    return tiny_models.llama()


@pytest.fixture
def tokenizer():
    return tiny_models.tokenizer()


def written(model, tokenizer, prompt, **options):
    """The tokens that `generate` writes."""
    ids = []
    own = model.generate

    def recorded(**arguments):
        output = own(**arguments)
        ids.extend(output[0, arguments["input_ids"].shape[1] :].tolist())
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "generate", recorded)
        generate(model, tokenizer, prompt, **options)
    return ids


def greedy(model, tokenizer, prompt, count):
    """One full forward pass per token, without a cache."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, length:], skip_special_tokens=True).strip("\n")


def test_greedy_generation_agrees_with_the_model_without_a_cache(model, tokenizer, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = generate(model, tokenizer, "The quick", max_new_tokens=12)
    assert text and text == greedy(model, tokenizer, "The quick", 12)
    assert capfd.readouterr() == ("", "")
    # Sampling settings of the checkpoint do not change it.
    model.generation_config.update(do_sample=True, temperature=0.6, repetition_penalty=3.0)
    assert generate(model, tokenizer, "The quick", max_new_tokens=12) == text


def test_generation_stops_at_the_end_token(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(1.0)
    model.generation_config.eos_token_id = 0
    assert generate(model, tokenizer, "The quick", max_new_tokens=12) == ""


def test_generation_stops_at_a_text_and_leaves_it_out(model, tokenizer):
    whole = written(model, tokenizer, "The river", max_new_tokens=24)
    text = tokenizer.decode(whole)
    stop = next(text[n : n + 3] for n in range(8, len(text)) if text.index(text[n : n + 3]) == n)
    ids = written(model, tokenizer, "The river", max_new_tokens=24, stop_text=stop)
    assert ids == whole[: len(ids)] and len(ids) < len(whole)
    assert stop in tokenizer.decode(ids) and stop not in tokenizer.decode(ids[:-1])
    found = generate(model, tokenizer, "The river", max_new_tokens=24, stop_text=stop)
    assert found == text.partition(stop)[0].strip("\n")


def test_sampling_follows_the_seed_and_leaves_the_random_state(model, tokenizer):
    state = torch.get_rng_state()
    first, again, other = (
        generate(model, tokenizer, "The quick", max_new_tokens=12, temperature=1.0, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_a_rendered_prompt_gets_no_second_beginning(model, tokenizer):
    tokenizer.add_bos_token = True
    assert tokenizer("The quick")["input_ids"][0] == tokenizer.bos_token_id
    rendered = generate(model, tokenizer, "<s>The quick", max_new_tokens=12, add_special_tokens=False)
    assert rendered == generate(model, tokenizer, "The quick", max_new_tokens=12)


def test_an_answer_ends_where_a_table_of_positions_does(model, tokenizer):
    table = tiny_models.gpt2(positions=32)
    prompt = "The quick brown fox jumps"
    # The last token is written without being read.
    room = 32 - len(tokenizer(prompt)["input_ids"]) + 1
    assert len(written(table, tokenizer, prompt, max_new_tokens=200)) <= room
    with torch.no_grad():
        table.transformer.ln_f.weight.zero_()
        table.transformer.ln_f.bias.zero_()
        model.model.norm.weight.zero_()
    table.generation_config.eos_token_id = 7
    assert len(written(table, tokenizer, prompt, max_new_tokens=200)) == room
    model.config.max_position_embeddings = 32
    model.generation_config.eos_token_id = 299
    assert len(written(model, tokenizer, prompt, max_new_tokens=50)) == 50, "rotary embeddings have no table"


def attended(heads, groups, queries=1, batch=2, **options):
    """By the attention that is in use, and by transformers' own. ``batch``: of the queries; 1 for all sequences."""
    drawn = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(size, generator=drawn)
        for size in ((batch, heads, queries, 8), (2, groups, 5, 8), (2, groups, 5, 6))
    )
    module = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)
    arguments = {"attention_mask": None, **options}
    ours, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, **arguments)
    return ours, SDPA(module, query.expand(2, -1, -1, -1), key, value, **arguments)[0]


@pytest.mark.parametrize(("heads", "groups", "batch"), [(4, 4, 2), (6, 2, 2), (3, 1, 2), (4, 2, 1)])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("mask", [None, (False, True, True), (-torch.inf, 0.0, 0.0)])
def test_attention_of_one_query_is_that_of_transformers(heads, groups, batch, scaling, mask):
    options = {} if mask is None else {"attention_mask": torch.tensor(mask)[[0, 1, 1, 2, 2]].view(1, 1, 1, 5)}
    with fast_one_token_attention():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not SDPA
        ours, theirs = attended(heads, groups, batch=batch, scaling=scaling, **options)
    assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"queries": 5},
        {"attention_mask": torch.tensor([True, False, True, True, False]).expand(1, 4, 1, 5)},
        {"position_bias": torch.linspace(-1, 1, 5).view(1, 1, 1, 5)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_all_other_attention_is_transformers_own(options):
    with pytest.raises(RuntimeError, match="ended"), fast_one_token_attention():
        ours, theirs = attended(4, 4, **options)
        raise RuntimeError("ended")
    assert torch.equal(ours, theirs)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is SDPA
