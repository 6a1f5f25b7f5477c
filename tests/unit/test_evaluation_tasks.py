import contextlib
import json

import pytest
import tiny_models

from llmpruner import DataError, UnknownNameError
from llmpruner.evaluation.tasks import TASK_GROUPS, builtin_manager, evaluate_tasks, expand, load_tasks
from llmpruner.progress import Progress

pytest.importorskip("lm_eval")

DATA = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
"""
TASK = """
task: llmpruner_capitals
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def task_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        {"question": f"Is {n} even? Answer:", "choices": [" yes", " no, it is not"], "label": n % 2} for n in range(10)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "capitals.yaml").write_text((DATA + TASK).format(data=tmp_path / "rows.jsonl"))
    return folder


class Shares(Progress):
    def __init__(self):
        self.seen = []

    @contextlib.contextmanager
    def bar(self, label):
        yield lambda share, now: self.seen.append(share)


def test_a_task_from_a_file_is_run_on_the_model(task_dir, capfd, monkeypatch):
    from lm_eval.models import huggingface

    # No repository of git, of whose commit lm-eval would ask.
    monkeypatch.chdir(task_dir)
    model, tokenizer = tiny_models.llama(), tiny_models.tokenizer()
    tokenizer.pad_token = pad = None
    before, shares = huggingface.tqdm, Shares()
    result = evaluate_tasks(
        model, tokenizer, ["llmpruner_capitals"], include_path=task_dir, batch_size=4, progress=shares
    )
    # Two requests a row, in a bar of ours; lm-eval's bars are as they were.
    assert shares.seen == sorted(shares.seen) and len(shares.seen) == 20 and shares.seen[-1] == 1
    assert huggingface.tqdm is before
    expected = accuracy(model, tokenizer, 10)
    assert result["llmpruner_capitals"]["acc"] == pytest.approx(expected)
    assert result["llmpruner_capitals"]["acc_stderr"] > 0
    limited = evaluate_tasks(model, tokenizer, ["llmpruner_capitals"], include_path=task_dir, limit=3)
    assert limited["llmpruner_capitals"]["acc"] == pytest.approx(accuracy(model, tokenizer, 3))
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
    assert tokenizer.pad_token == pad, "lm-eval sets one"


def accuracy(model, tokenizer, count):
    """The same task, scored by hand: the answer with the greater log-likelihood wins."""
    import torch

    hits = 0
    for n in range(count):
        scores = []
        question = tokenizer(f"Is {n} even? Answer:")["input_ids"]
        for answer in (" yes", " no, it is not"):
            ids = torch.tensor([question + tokenizer(answer)["input_ids"]])
            with torch.no_grad():
                logs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            scores.append(float(logs[len(question) - 1 :].sum()))
        hits += scores.index(max(scores)) == n % 2
    return hits / count


MEASURED = """
task: llmpruner_measured
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: mcc}}, {{metric: brier_score}}]
"""
WRITTEN = """
task: llmpruner_written
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 4, do_sample: false}}
filter_list:
  - name: whole
    filter: [{{function: take_first}}]
  - name: digits
    filter: [{{function: regex, regex_pattern: "([0-9])"}}, {{function: take_first}}]
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
  - {{metric: !function own.length, aggregation: mean, higher_is_better: false}}
  - {{metric: !function own.odd, aggregation: mean, higher_is_better: false}}
"""
OWN = """
def length(references, predictions):
    return len(predictions[0]) / 7


def odd(references, predictions):
    return float("nan") if references[0] == "1" else 1.0
"""
ROLLED = """
task: llmpruner_rolled
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
GROUP = """
group: llmpruner_group
task: [llmpruner_capitals, llmpruner_measured]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
"""


def test_the_scores_of_rows_have_the_mean_that_lm_eval_says(task_dir, tmp_path, monkeypatch):
    # The errors of metrics that are no means take lm-eval a minute each.
    monkeypatch.setattr("lm_eval.evaluator_utils.stderr_for_metric", lambda **_: None)
    for name, text in {"measured": MEASURED, "written": WRITTEN, "rolled": ROLLED}.items():
        (task_dir / f"{name}.yaml").write_text((DATA + text).format(data=tmp_path / "rows.jsonl"))
    (task_dir / "group.yaml").write_text(GROUP)
    (task_dir / "own.py").write_text(OWN)
    names = ["llmpruner_group", "llmpruner_written", "llmpruner_rolled"]
    found = evaluate_tasks(tiny_models.llama(), tiny_models.tokenizer(), names, include_path=task_dir, limit=7)
    assert set(found) == {*names, "llmpruner_capitals", "llmpruner_measured"}
    # Neither a group nor a task whose metrics are no means over rows; no metric with a row that has no number.
    scored = {task: set(rows.scores) for task, rows in found.rows.items()}
    assert scored == {
        "llmpruner_capitals": {"acc"},
        "llmpruner_measured": {"acc", "acc_norm"},
        "llmpruner_written": {f"{name} ({kind})" for name in ("exact_match", "length") for kind in ("whole", "digits")},
    }
    assert {"mcc", "brier_score"} < set(found["llmpruner_measured"]) and found["llmpruner_group"]["acc"] >= 0
    for task, rows in found.rows.items():
        for metric, scores in rows.scores.items():
            assert len(scores) == 7 and sum(scores) / 7 == pytest.approx(found[task][metric], abs=1e-12)
    written = found.rows["llmpruner_written"].scores
    assert written["length (whole)"] != written["length (digits)"]
    assert any(isinstance(score, float) for score in written["length (digits)"])
    assert all(isinstance(score, int) for score in found.rows["llmpruner_measured"].scores["acc"])
    # The rows of both tasks are the same, those of fewer rows are others.
    same = {rows.sha256 for rows in found.rows.values()}
    fewer = evaluate_tasks(
        tiny_models.llama(), tiny_models.tokenizer(), ["llmpruner_capitals"], include_path=task_dir, limit=6
    )
    assert len(same) == 1 and fewer.rows["llmpruner_capitals"].sha256 not in same


def test_loaded_tasks_serve_several_models(task_dir):
    tasks = load_tasks(["llmpruner_capitals"], include_path=task_dir)
    tokenizer = tiny_models.tokenizer()
    for seed in (0, 5):
        model = tiny_models.llama(seed=seed)
        result = evaluate_tasks(model, tokenizer, tasks, num_fewshot=0, limit=7)
        assert result["llmpruner_capitals"]["acc"] == pytest.approx(accuracy(model, tokenizer, 7))


@pytest.mark.slow
def test_an_unknown_task_is_refused_before_the_model_runs():
    class Untouchable:
        def __getattr__(self, name):
            raise AssertionError(f"the model was asked for {name}")

    with pytest.raises(UnknownNameError, match=r"unknown task 'piqqa'; did you mean .*piqa") as caught:
        evaluate_tasks(Untouchable(), None, ["openbookqa", "piqqa"])
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_unreachable_data_names_the_way_out(task_dir, tmp_path):
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"data of task 'llmpruner_capitals' cannot be.*--include-path"):
        evaluate_tasks(None, None, ["llmpruner_capitals"], include_path=task_dir)


def test_a_missing_include_path(tmp_path):
    with pytest.raises(DataError, match=r"--include-path .*none: no such directory"):
        evaluate_tasks(None, None, ["piqa"], include_path=tmp_path / "none")


def test_names_are_expanded_once():
    known = ["arc_easy", "arc_challenge", *TASK_GROUPS["paper"], "mmlu_law", "mmlu_logic"]
    assert expand(["paper", "piqa"], known) == list(TASK_GROUPS["paper"])
    assert expand(["mmlu_*"], known) == ["mmlu_law", "mmlu_logic"]
    with pytest.raises(DataError, match="no task was named"):
        expand([], known)


@pytest.mark.slow
def test_the_paper_suite_exists_in_lm_eval():
    assert expand(["paper"], builtin_manager().all_tasks) == list(TASK_GROUPS["paper"])


@pytest.mark.long
@pytest.mark.timeout(1000)
def test_the_numbers_are_those_of_the_lm_eval_command_to_the_digit(task_dir, tmp_path):
    """With an example in the prompt, which is drawn by a seed."""
    import os
    import subprocess
    import sys

    model, name = tiny_models.llama(), "llmpruner_capitals"
    model.save_pretrained(tmp_path / "model")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args",
        f"pretrained={tmp_path / 'model'},dtype=float32",
        "--tasks", name, "--include_path", str(task_dir), "--device", "cpu", "--batch_size", "8",
        "--num_fewshot", "1", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"][name]
    wanted = {key.partition(",")[0]: value for key, value in theirs.items() if isinstance(value, float)}
    ours = evaluate_tasks(model, tiny_models.tokenizer(), [name], include_path=task_dir, num_fewshot=1)
    assert wanted.keys() == {"acc", "acc_stderr"} and ours[name] == wanted


def test_a_task_is_known_by_its_rows_and_its_definition(task_dir, tmp_path):
    def identity(limit=None):
        return load_tasks(["llmpruner_capitals"], include_path=task_dir).identity("llmpruner_capitals", limit)

    one = identity()
    assert identity() == one != identity(3)
    file = task_dir / "capitals.yaml"
    file.write_text(file.read_text().replace("metric: acc", "metric: acc_norm"))
    other = identity()
    assert other != one
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows.replace("Is 3 even", "Is 5 even"))
    assert identity() != other


@pytest.mark.parametrize("own", [False, True], ids=["asked for", "of the task"])
def test_a_task_is_known_by_the_rows_that_its_examples_are_drawn_from(task_dir, tmp_path, own):
    file, shown = task_dir / "capitals.yaml", tmp_path / "shown.jsonl"
    rows = (tmp_path / "rows.jsonl").read_text()
    shown.write_text(rows)
    text = file.read_text().replace("    test: ", f"    train: {shown}\n    test: ") + "training_split: train\n"
    assert "train: " in text
    file.write_text(text + "num_fewshot: 2\n" if own else text)

    def identity(num_fewshot, limit=3):
        loaded = load_tasks(["llmpruner_capitals"], include_path=task_dir)
        return loaded.identity("llmpruner_capitals", limit, num_fewshot)

    shots = None if own else 2
    with_examples, without = identity(shots), identity(0)
    assert identity(shots) == with_examples
    shown.write_text(rows.replace("Is 7 even", "Is 9 even"))
    assert identity(0) == without and identity(shots) != with_examples
