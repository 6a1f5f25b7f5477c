"""Several models by several metrics: one model in memory at a time, results as JSON and a table. Perplexity by hand."""

import gc
import json
import math
import weakref
from pathlib import Path

import pytest
import tiny_models
import torch
from evaluated_models import evaluated, in_memory
from tokenizers.processors import TemplateProcessing

import llmpruner
from llmpruner import CheckpointError, DataError, Metric, ModelError, Row, hookimpl
from llmpruner.discovery.oracle import logits
from llmpruner.errors import PluginError, SettingsError
from llmpruner.evaluation.evaluate import Evaluation, Evaluations, chosen_metrics
from llmpruner.evaluation.metrics import PerplexityMetric, SizeMetric
from llmpruner.evaluation.perplexity import perplexity
from llmpruner.evaluation.tasks import TasksMetric
from llmpruner.settings import EvaluateSettings
from llmpruner.testing import catalog_with


class Largest(Metric):
    name = "largest"

    def measure(self, subject):
        return {"weight": float(subject.model.lm_head.weight.detach().abs().max())}


class Distance(Metric):
    name = "distance"
    needs_reference = True

    def measure(self, subject):
        pairs = zip(subject.model.parameters(), subject.reference.parameters(), strict=True)
        return {"to first": max(float((a - b).detach().abs().max()) for a, b in pairs)}


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(tiny_models.TEXT)
    return str(tmp_path / "text.txt")


def test_one_model_gives_one_evaluation_with_plain_numbers_and_a_list_a_list(text):
    options = {"window": 16, "settings": {"perplexity": {"tokens": 64}}}
    found = llmpruner.evaluate(in_memory(), perplexity=text, **options)
    assert found.parameters == sum(p.numel() for p in tiny_models.llama().parameters())
    assert found.weight_bytes == 4 * found.parameters and found.kl is None and found.tasks == {}
    assert found.perplexity > 1 and found.perplexity == found.results["perplexity"]["perplexity"]
    assert found.bits_per_byte == found.results["perplexity"]["bits_per_byte"] and "<table" in found._repr_html_()
    (same,) = llmpruner.evaluate([in_memory()], perplexity=text, **options)
    assert same == found
    _, other = llmpruner.evaluate([in_memory(), in_memory(seed=1)], perplexity=text, kl=True, **options)
    assert other.kl == other.results["perplexity"]["kl_per_token"] > 0
    plain = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert list(plain) == ["name", "size", "perplexity"]


def test_the_context_reaches_what_measures():
    short, long = (evaluated([in_memory], [SizeMetric(context=n)])[0].results["size"] for n in (1, 100))
    assert long["macs_per_token"] > short["macs_per_token"]


@pytest.mark.slow
def test_one_model_is_in_memory_at_a_time_unless_a_metric_asks_for_the_first():
    for metrics, held in (([Largest()], 0), ([Largest(), Distance()], 1)):
        alive, models = [], []

        def load(seed, alive=alive, models=models):
            gc.collect()
            alive.append(sum(ref() is not None for ref in models))
            loaded = in_memory(f"seed {seed}", seed=seed)
            models.append(weakref.ref(loaded.network))
            return loaded

        found = evaluated([lambda: load(0), lambda: load(1), lambda: load(2)], metrics)
        assert alive == [0, held, held]
    distances = [evaluation.results["distance"]["to first"] for evaluation in found]
    assert distances[0] == 0 and min(distances[1:]) > 0


def test_texts_and_tasks_are_read_before_any_model_is_loaded(tmp_path):
    def never():
        raise AssertionError("a model was loaded")

    with pytest.raises(DataError, match=r"nowhere\.txt: no such file"):
        evaluated([never], [SizeMetric(), PerplexityMetric(text="nowhere.txt")])
    with pytest.raises(DataError, match="no such directory"):
        evaluated([never], [TasksMetric(names="piqa", include_path=tmp_path / "none")])
    with pytest.raises(SettingsError, match="metric perplexity compares models with the first"):
        evaluated([never], [PerplexityMetric(kl=True)])


def scored(name, *rows):
    return Evaluation(name, {}, rows)


def test_the_table_has_a_line_per_label_and_the_numbers_of_people():
    dense = scored(
        "dense", Row("parameters", 106_202_880, False), Row("bytes in memory", 400 * 2**20, False),
        Row("perplexity", 25.615, False), Row("KL to the first", None, False), Row("piqa acc", 0.66, True, 0.05),
    )  # fmt: skip
    pruned = scored("pruned", Row("parameters", 90, False), Row("perplexity", math.inf, False), Row("other", 3.0))
    lines = Evaluations([dense, pruned]).lines
    assert {line.label: line.cells for line in lines} == {
        "parameters": ("106.20 M", "90.00"), "bytes in memory": ("400.0 MiB", "-"), "perplexity": ("25.61", "inf"),
        "piqa acc": ("0.6600 ± 0.0500", "-"), "other": ("-", "3.0000"),
    }  # fmt: skip
    assert [line.higher_is_better for line in lines] == [False, False, False, True, None]


def test_task_scores_become_rows_with_their_errors():
    scores = {"piqa": {"acc": 0.5, "acc_stderr": 0.1}, "wiki": {"word_perplexity": 9.0, "brier": 0.2}}
    assert TasksMetric().rows(scores) == [
        Row("piqa acc", 0.5, True, 0.1),
        Row("wiki word_perplexity", 9.0, False),
        Row("wiki brier", 0.2, None),
    ]


def test_a_number_that_is_not_finite_is_null_in_json_and_kept_in_python():
    broken = Evaluation("x", {"perplexity": {"perplexity": math.inf}, "own": {"list": [math.nan, 1.0]}})
    plain = broken.as_json()
    assert plain["perplexity"] == {"perplexity": None} and plain["own"] == {"list": [None, 1.0]}
    assert broken.results["perplexity"]["perplexity"] == math.inf


@pytest.mark.parametrize(
    ("given", "reason"), [({"a": torch.ones(())}, "of type Tensor is not JSON"), (None, "'NoneType' object")]
)
def test_what_is_no_json_is_an_error_that_names_the_metric(given, reason):
    broken = type("Broken", (Metric,), {"name": "broken", "measure": lambda self, subject: given})
    hook = hookimpl(specname="llmpruner_metrics")(lambda: [broken])
    catalog = catalog_with(type("Plugin", (), {"llmpruner_metrics": staticmethod(hook)})())
    with pytest.raises(PluginError, match=f"metric broken gave no JSON values by name: .*{reason}"):
        llmpruner.evaluate(in_memory(), metrics=["broken"], catalog=catalog)


def test_a_notebook_shows_an_escaped_table():
    table = Evaluations([scored("a<b>", Row("size & more", 1.0))])._repr_html_()
    assert table == (
        "<table><tr><th></th><th>a&lt;b&gt;</th></tr><tr><th>size &amp; more</th><td>1.0000</td></tr></table>"
    )


def test_too_few_positions_are_found_before_weights_are_read(text, tmp_path):
    model = tiny_models.gpt2(positions=32)
    model.save_pretrained(tmp_path / "short")
    tiny_models.tokenizer().save_pretrained(tmp_path / "short")
    (tmp_path / "short" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(
        DataError, match=r"windows of 64 tokens are beyond the 32 positions of '.*short'; lower --window$"
    ):
        llmpruner.evaluate(tmp_path / "short", perplexity=text, window=64)


def _unloadable(folder: Path, vocabulary: int = 300, text: str = tiny_models.TEXT) -> str:
    """A model whose weights cannot be read, with a tokenizer that was trained on ``text``."""
    tiny_models.tokenizer(text).save_pretrained(folder)
    tiny_models.llama(vocab_size=vocabulary).config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    return str(folder)


@pytest.mark.parametrize("metric", ["perplexity", "given-answers"])
def test_models_of_other_vocabularies_are_not_compared(text, tmp_path, metric):
    """The number was one of unrelated tokens, or IndexError ended the run where the first model had fewer."""
    data = tmp_path / "answers.jsonl"
    data.write_text(json.dumps({"prompt": "The quick", "completion": " brown fox"}) + "\n")
    if metric == "given-answers":
        options = {"metrics": [metric], "settings": {metric: {"data": str(data), "kl": True}}}
    else:
        options = {"perplexity": text, "kl": True, "window": 16}
    first, same = _unloadable(tmp_path / "first"), _unloadable(tmp_path / "same")
    larger = _unloadable(tmp_path / "larger", vocabulary=310)
    other = _unloadable(tmp_path / "other", text="Other words: zebra crossing, quiet foxes, brownish quarks. " * 9)
    for pair, message in (
        ((first, larger), "vocabularies of '.*first' and '.*larger' differ; KL"),
        ((larger, first), "is missing or damaged"),  # all tokens of one are the other's
        ((first, other), "vocabularies of '.*first' and '.*other' differ; KL"),
        ((first, same), "is missing or damaged"),
        ((first, same, other), "vocabularies of '.*first' and '.*other' differ"),
    ):
        with pytest.raises((ModelError, CheckpointError), match=message):
            llmpruner.evaluate(list(pair), **options)
    with pytest.raises(CheckpointError, match="is missing or damaged"):
        llmpruner.evaluate([first, other], perplexity=text, window=16)


def test_a_limit_without_tasks_is_refused(catalog):
    with pytest.raises(SettingsError, match="--limit is of --tasks"):
        chosen_metrics(EvaluateSettings(limit=3), catalog)


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
    model.lm_head.weight.data[7] = torch.nan
    with pytest.raises(ModelError, match=r"predictions are not numbers \(NaN\).*weights are damaged"):
        perplexity(model, tiny_models.tokenizer(), tiny_models.TEXT, window=16)


def test_windows_begin_with_what_the_tokenizer_puts_before_a_text_which_is_not_predicted():
    """One token as a rule, here two; the first of the text is predicted."""
    model, reference, tokenizer = tiny_models.llama(), tiny_models.llama(seed=1), tiny_models.tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing("</s> <s> $A", None, [("<s>", 0), ("</s>", 1)])
    ids = tokenizer(tiny_models.TEXT, add_special_tokens=False)["input_ids"][:56]
    table = torch.cat([torch.tensor([[1, 0]]).expand(4, -1), torch.tensor(ids).view(4, 14)], 1)
    log_p, log_q = (logits(m, table)[:, 1:-1].double().log_softmax(-1) for m in (reference, model))
    options = {"window": 16, "tokens": 64, "batch_size": 3, "reference": reference}
    result = perplexity(model, tokenizer, tiny_models.TEXT, **options)
    assert (result.windows, result.tokens, result.bos) == (4, 56, True)
    assert result.nll_per_token == pytest.approx(-float(log_q.gather(-1, table[:, 2:, None]).mean()), rel=1e-6)
    assert result.kl_per_token == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-5)
    with pytest.raises(DataError, match="no full window of 2"):
        perplexity(model, tokenizer, tiny_models.TEXT, window=2)
