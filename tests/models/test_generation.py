import copy
import warnings

import pytest
import tiny_models
import torch

from llmpruner.models.generation import generate


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


def test_greedy_generation_agrees_with_the_model_without_a_cache(capfd):
    model, tokenizer = tiny_models.llama(), tiny_models.tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = generate(model, tokenizer, "The quick", max_new_tokens=12)
    assert text and text == greedy(model, tokenizer, "The quick", 12)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_sampling_settings_of_the_checkpoint_do_not_change_greedy():
    model, tokenizer = tiny_models.llama(), tiny_models.tokenizer()
    expected = generate(model, tokenizer, "The quick", max_new_tokens=12)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.6
    model.generation_config.repetition_penalty = 3.0
    assert generate(model, tokenizer, "The quick", max_new_tokens=12) == expected


def test_generation_stops_at_the_end_token():
    model, tokenizer = tiny_models.llama(), tiny_models.tokenizer()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(1.0)
    model.generation_config.eos_token_id = 0
    assert generate(model, tokenizer, "The quick", max_new_tokens=12) == ""


def test_generation_stops_at_a_text_and_leaves_it_out():
    model, tokenizer = tiny_models.llama(), tiny_models.tokenizer()
    whole = written(model, tokenizer, "The river", max_new_tokens=24)
    text = tokenizer.decode(whole)
    stop = next(text[n : n + 3] for n in range(8, len(text)) if text.index(text[n : n + 3]) == n)
    ids = written(model, tokenizer, "The river", max_new_tokens=24, stop_text=stop)
    assert ids == whole[: len(ids)] and len(ids) < len(whole)
    assert stop in tokenizer.decode(ids) and stop not in tokenizer.decode(ids[:-1])
    found = generate(model, tokenizer, "The river", max_new_tokens=24, stop_text=stop)
    assert found == text.partition(stop)[0].strip("\n")


def test_sampling_follows_the_seed_and_leaves_the_random_state():
    model, tokenizer = tiny_models.llama(), tiny_models.tokenizer()
    state = torch.get_rng_state()
    first, again, other = (
        generate(model, tokenizer, "The quick", max_new_tokens=12, temperature=1.0, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_a_rendered_prompt_gets_no_second_beginning():
    model, tokenizer = tiny_models.llama(), copy.deepcopy(tiny_models.tokenizer())
    tokenizer.add_bos_token = True
    assert tokenizer("The quick")["input_ids"][0] == tokenizer.bos_token_id
    rendered = generate(model, tokenizer, "<s>The quick", max_new_tokens=12, add_special_tokens=False)
    assert rendered == generate(model, tokenizer, "The quick", max_new_tokens=12)


def test_an_answer_ends_where_a_table_of_positions_does():
    model, tokenizer = tiny_models.gpt2(positions=32), tiny_models.tokenizer()
    prompt = "The quick brown fox jumps"
    length = len(tokenizer(prompt)["input_ids"])
    # The last token is written without being read.
    assert len(written(model, tokenizer, prompt, max_new_tokens=200)) <= 32 - length + 1
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()
    model.generation_config.eos_token_id = 7
    assert len(written(model, tokenizer, prompt, max_new_tokens=200)) == 32 - length + 1
    rotary = tiny_models.llama()
    rotary.config.max_position_embeddings = 32
    rotary.generation_config.eos_token_id = 299
    with torch.no_grad():
        rotary.model.norm.weight.zero_()
    assert len(written(rotary, tokenizer, prompt, max_new_tokens=50)) == 50
