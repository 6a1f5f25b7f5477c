import math

import pytest
import tiny_models
import torch
from tokenizers.processors import TemplateProcessing

from llmpruner import DataError, ModelError
from llmpruner.evaluation.perplexity import perplexity


def test_agrees_with_one_window_after_the_other():
    model, tokenizer = tiny_models.llama(), tiny_models.tokenizer()
    ids = tokenizer(tiny_models.TEXT, add_special_tokens=False)["input_ids"]
    windows = len(ids) // 16
    table = torch.tensor(ids[: windows * 16]).view(windows, 1, 16)
    with torch.no_grad():
        expected = sum(float(model(input_ids=window, labels=window).loss) for window in table) / windows
    result = perplexity(model, tokenizer, tiny_models.TEXT, window=16, batch_size=3)
    assert result.nll_per_token == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-6)
    assert (result.windows, result.window, result.tokens) == (windows, 16, windows * 16)


def test_bits_per_byte_counts_the_bytes_that_were_read():
    model, tokenizer = tiny_models.llama(), tiny_models.tokenizer()
    text = "é" * 64 + tiny_models.TEXT
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    read = len(tokenizer.decode(ids[:128]).encode())
    result = perplexity(model, tokenizer, text, window=32, tokens=128)
    assert result.tokens == 128
    assert result.bits_per_byte == pytest.approx(result.nll_per_token / math.log(2) * 128 / read)


def test_divergence_from_a_reference_by_hand():
    model, reference = tiny_models.llama(), tiny_models.llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    tokenizer = tiny_models.tokenizer()
    ids = tokenizer(tiny_models.TEXT, add_special_tokens=False)["input_ids"][:64]
    table = torch.tensor(ids).view(4, 16)
    with torch.no_grad():
        p, q = (m(input_ids=table).logits[:, :-1].double().softmax(-1) for m in (reference, model))
    expected = float((p * (p / q).log()).sum(-1).mean())
    options = {"window": 16, "tokens": 64, "batch_size": 3}
    result = perplexity(model, tokenizer, tiny_models.TEXT, reference=reference, **options)
    assert expected > 1e-3
    assert result.kl_per_token == pytest.approx(expected, rel=1e-4)
    same = perplexity(model, tokenizer, tiny_models.TEXT, reference=model, **options)
    assert same.kl_per_token == pytest.approx(0.0, abs=1e-9)
    assert perplexity(model, tokenizer, tiny_models.TEXT, **options).kl_per_token is None


def test_autocast_changes_little(monkeypatch):
    monkeypatch.setattr("llmpruner.evaluation.perplexity.multiplies_bfloat16_fast", lambda device: True)
    model, tokenizer = tiny_models.llama(), tiny_models.tokenizer()
    many, half = (
        perplexity(model, tokenizer, tiny_models.TEXT, window=16, batch_size=size, autocast=half).perplexity
        for size, half in ((8, False), (8, True))
    )
    assert half == pytest.approx(many, rel=1e-2) and half != many


def test_a_model_that_predicts_no_numbers_has_no_perplexity():
    model = tiny_models.llama()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(ModelError, match=r"predictions are not numbers \(NaN\).*weights are damaged"):
        perplexity(model, tiny_models.tokenizer(), tiny_models.TEXT, window=16)


def test_windows_begin_with_what_the_tokenizer_puts_before_a_text_which_is_not_predicted():
    """One token as a rule, here two; the first of the text is predicted."""
    model, reference, tokenizer = tiny_models.llama(), tiny_models.llama(seed=1), tiny_models.tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing("</s> <s> $A", None, [("<s>", 0), ("</s>", 1)])
    ids = tokenizer(tiny_models.TEXT, add_special_tokens=False)["input_ids"][:56]
    table = torch.cat([torch.tensor([[1, 0]]).expand(4, -1), torch.tensor(ids).view(4, 14)], 1)
    with torch.no_grad():
        log_p, log_q = (m(input_ids=table).logits[:, 1:-1].double().log_softmax(-1) for m in (reference, model))
    result = perplexity(model, tokenizer, tiny_models.TEXT, window=16, tokens=64, reference=reference)
    assert (result.windows, result.tokens, result.bos) == (4, 56, True)
    assert result.nll_per_token == pytest.approx(-float(log_q.gather(-1, table[:, 2:, None]).mean()), rel=1e-6)
    assert result.kl_per_token == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-5)
    with pytest.raises(DataError, match="no full window of 2"):
        perplexity(model, tokenizer, tiny_models.TEXT, window=2)
