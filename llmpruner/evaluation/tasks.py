"""The metric ``tasks``: benchmark tasks of lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import copy
import io
import random
from collections.abc import Mapping, Sequence
from fnmatch import filter as matching
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field

from ..component import ComponentSettings
from ..errors import DataError, MissingExtraError, first_line, near
from ..progress import only_errors
from ..values import Names
from .evaluate import Metric, MetricSubject, Row

PAPER = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""``paper``: the zero-shot tasks of LLM-Pruner, table 1."""


class TasksMetric(Metric):
    """Tasks of lm-evaluation-harness, with the numbers of ``lm_eval --model hf`` with the same batch size."""

    name = "tasks"
    summary = "benchmark tasks of lm-evaluation-harness; by default the seven of LLM-Pruner, table 1"

    class Settings(ComponentSettings):
        names: Names = Field(
            ("paper",),
            description="lm-eval tasks, groups or patterns, comma-separated; 'paper' is LLM-Pruner's seven: boolq, "
            "piqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa.",
        )
        limit: int | None = Field(None, ge=1, description="Rows per task; all by default.")
        num_fewshot: int | None = Field(
            None, ge=0, description="Examples shown in each task's prompt; by default the task's own number, mostly 0."
        )
        include_path: Path | None = Field(
            None, description="Folder with additional lm-eval task files, such as for offline data."
        )
        batch_size: int = Field(8, ge=1, description="Rows per batch.")

    settings: Settings

    def prepare(self) -> None:
        if find_spec("lm_eval") is None:
            raise MissingExtraError("lm-eval", "evaluate")
        names = [each for name in self.settings.names for each in (PAPER if name == "paper" else (name,))]
        # Notices of lm-eval, and bars of datasets, have no common setting, but all go to standard error.
        with only_errors("lm_eval"), contextlib.redirect_stderr(io.StringIO()):
            manager, loaded = _manager(names, self.settings.include_path), []
            for name in expand(names, manager.all_tasks):
                try:
                    loaded.append(manager.load([name]))
                except Exception as error:  # the libraries that load data raise errors of many types
                    hint = "without the hub, give task files that read local data with --set tasks.include_path=DIR"
                    reason = f"the data of task '{name}' cannot be loaded: {first_line(error)}"
                    raise DataError(f"{reason}; {hint}") from error
        self._tasks, self._groups = (
            {name: each for part in loaded for name, each in part.get(kind, {}).items()} for kind in ("tasks", "groups")
        )

    def measure(self, subject: MetricSubject) -> dict[str, dict[str, float]]:
        """Task → metric → value, with ``<metric>_stderr`` for metrics that have a standard error."""
        with only_errors("lm_eval"):
            from lm_eval.evaluator import evaluate
            from lm_eval.models.huggingface import HFLM

            from ..models.tokenizer import with_padding

            self._set_shots_and_seeds()
            tokenizer = copy.deepcopy(with_padding(subject.tokenizer, subject.model))
            batch_size, tasks = self.settings.batch_size, {"tasks": self._tasks, "groups": self._groups}
            lm = HFLM(pretrained=subject.model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
            results = evaluate(lm=lm, task_dict=tasks, limit=self.settings.limit, log_samples=False)["results"]
        return {task: _scores(values) for task, values in results.items()}

    def _set_shots_and_seeds(self) -> None:
        """As lm-eval's ``simple_evaluate`` sets them, which then asks git, pip and others about the machine."""
        import numpy as np
        import torch
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

        for task in self._tasks.values():
            shots = task.get_config("num_fewshot")
            if shots != 0 and self.settings.num_fewshot is not None:  # with 0, it is meant to have no examples
                shots = self.settings.num_fewshot
            task.set_config("num_fewshot", shots or 0)
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)

    def rows(self, result: Mapping[str, Any]) -> Sequence[Row]:
        rows = []
        for task, values in result.items():
            for name in (name for name in values if not name.endswith("_stderr")):
                lower = name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
                better = False if lower else True if name.startswith(("acc", "exact_match", "f1")) else None
                rows.append(Row(f"{task} {name}", values[name], better, values.get(f"{name}_stderr")))
        return rows


def _scores(values: Mapping[str, Any]) -> dict[str, float]:
    """The metrics among the facts of a task: lm-eval names them ``metric,filter``."""
    scores = {}
    for key, value in values.items():
        name, _, filtered_by = key.partition(",")
        if isinstance(value, int | float) and not isinstance(value, bool) and filtered_by:
            scores[name if filtered_by == "none" else f"{name} ({filtered_by})"] = float(value)
    return scores


def expand(tasks: Sequence[str], known: Sequence[str]) -> list[str]:
    """``tasks`` with patterns expanded, each name once. Raises `DataError` for an unknown name."""
    names: list[str] = []
    for task in tasks:
        names += (matches := matching(known, task))
        if not matches:
            # Not the list of all, which are thousands.
            hint = "'lm_eval ls tasks' lists all, --set tasks.include_path=DIR adds your own"
            raise DataError(f"unknown task '{task}'{near(task, [*known, 'paper'])}; {hint}")
    return list(dict.fromkeys(names))


@cache
def builtin_manager() -> Any:
    """lm-eval's index of its own tasks, cached, as reading their ten thousand files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _manager(names: Sequence[str], include_path: Path | None) -> Any:
    """The index that has ``names``; a file in ``include_path`` is preferred to others of the same name."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return builtin_manager()
    if not include_path.is_dir():
        raise DataError(f"tasks.include_path = {include_path}: no such directory")
    # Without the index of lm-eval's own tasks, which takes seconds, where that is enough.
    manager = TaskManager(include_path=str(include_path), include_defaults=False)
    return manager if set(names) <= set(manager.all_subtasks) else TaskManager(include_path=str(include_path))
