import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch

from llmpruner import DataError
from llmpruner.evaluation.tasks import PAPER, TasksMetric, builtin_manager, expand

TASK = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
task: llmpruner_capitals
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
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
    (folder / "capitals.yaml").write_text(TASK.replace("DATA", str(tmp_path / "rows.jsonl")))
    return folder


def scores(model, tokenizer, **settings):
    metric = TasksMetric(names="llmpruner_capitals", **settings)
    metric.prepare()
    return metric.measure(SimpleNamespace(model=model, tokenizer=tokenizer))["llmpruner_capitals"]


def test_a_task_from_a_file_is_run_on_the_model(task_dir, capfd, monkeypatch):
    # No repository of git, of whose commit lm-eval would ask.
    monkeypatch.chdir(task_dir)
    model, tokenizer = tiny_models.llama(), tiny_models.tokenizer()
    tokenizer.pad_token = pad = None
    result = scores(model, tokenizer, include_path=task_dir, batch_size=4)
    assert result["acc"] == pytest.approx(accuracy(model, tokenizer, 10))
    assert result["acc_stderr"] > 0
    limited = scores(model, tokenizer, include_path=task_dir, limit=3)
    assert limited["acc"] == pytest.approx(accuracy(model, tokenizer, 3))
    captured = capfd.readouterr()
    assert captured.out == "" and "fatal" not in captured.err
    assert tokenizer.pad_token == pad, "lm-eval sets one"


def accuracy(model, tokenizer, count):
    """The same task, scored by hand: the answer with the greater log-likelihood wins."""
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


@pytest.fixture(scope="module")
def few():
    """lm-eval's index of some folders: that of all ten thousand files takes a quarter of a minute."""
    from lm_eval import tasks

    folder = Path(tasks.__file__).parent
    names = ("arc", "hellaswag", "openbookqa", "piqa", "super_glue", "winogrande")
    return tasks.TaskManager(include_path=[str(folder / name) for name in names], include_defaults=False)


def test_an_unknown_task_is_refused(few, monkeypatch):
    monkeypatch.setattr("llmpruner.evaluation.tasks.builtin_manager", lambda: few)
    with pytest.raises(DataError, match=r"unknown task 'piqqa'; did you mean .*piqa") as caught:
        TasksMetric(names="paper,piqqa").prepare()
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_unreachable_data_names_the_way_out(task_dir, tmp_path):
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"data of task 'llmpruner_capitals' cannot be.*tasks\.include_path"):
        TasksMetric(names="llmpruner_capitals", include_path=task_dir).prepare()


def test_names_are_expanded_once():
    known = [*PAPER, "mmlu_law", "mmlu_logic"]
    assert expand(["piqa", "arc_*", "arc_easy"], known) == ["piqa", "arc_easy", "arc_challenge"]
    assert expand(["mmlu_*"], known) == ["mmlu_law", "mmlu_logic"]


def test_the_paper_suite_exists_in_lm_eval(few):
    assert expand(PAPER, few.all_tasks) == list(PAPER)


@pytest.mark.long
def test_all_tasks_of_lm_eval_are_known():
    assert {*PAPER, "mmlu_abstract_algebra"} <= set(builtin_manager().all_tasks)


@pytest.mark.long
@pytest.mark.timeout(1000)
def test_the_numbers_are_those_of_the_lm_eval_command_to_the_digit(task_dir, tmp_path):
    """With an example in the prompt, which is drawn by a seed."""
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
    ours = scores(model, tiny_models.tokenizer(), include_path=task_dir, num_fewshot=1)
    assert wanted.keys() == {"acc", "acc_stderr"} and ours == wanted
