"""Greedy and sampled text, where it ends, and the fast attention of one token."""

import warnings
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmpruner.models.generation import fast_one_token_attention, generate

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
def test_attention_of_one_query_is_that_of_transformers(heads, groups, batch, scaling):
    with fast_one_token_attention():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not SDPA
        ours, theirs = attended(heads, groups, batch=batch, scaling=scaling)
    assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"queries": 5},
        {"attention_mask": torch.tensor([True, False, True, True, False]).view(1, 1, 1, 5)},
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
