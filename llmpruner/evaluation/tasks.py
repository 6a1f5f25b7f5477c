"""Benchmark tasks of lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Mapping, Sequence
from fnmatch import filter as matching
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, MissingExtraError, first_line, near
from ..progress import only_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAPER = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""``paper``: the zero-shot tasks of LLM-Pruner, table 1."""

Scores = dict[str, dict[str, float]]
"""Task → metric → value, with ``<metric>_stderr`` for metrics that have a standard error."""


def load_tasks(names: Sequence[str], *, include_path: Path | None = None) -> list[Any]:
    """lm-eval's task and group objects, with their data loaded, for any number of models. ``names``: of tasks, groups
    and patterns (``mmlu_*``), or ``paper``. ``include_path``: folder of more task files, preferred to others of the
    same name. Raises `DataError`."""
    # Notices of lm-eval, and bars of datasets, have no common setting, but all go to standard error.
    with only_errors("lm_eval"), contextlib.redirect_stderr(io.StringIO()):
        manager = _manager(names, include_path)
        return [task for name in expand(names, manager.all_tasks) for task in _load(manager, name)]


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[Any],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
) -> Scores:
    """The numbers of the command ``lm_eval --model hf`` with the same batch size. ``limit``: number of rows per task.
    ``num_fewshot``: by default the task's own number."""
    from unittest.mock import patch

    with only_errors("lm_eval"), patch("lm_eval.evaluator.get_git_commit_hash", lambda: None):
        # lm-eval would ask git for the commit of the working directory, which is none of the model.
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        from ..models.tokenizer import with_padding

        padded = with_padding(tokenizer, model)
        wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(padded), batch_size=batch_size, backend="causal")
        results = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            # Not used for loaded tasks, but avoids building the index again.
            task_manager=_task_manager()(include_defaults=False),
        )["results"]
    return {task: _scores(values) for task, values in results.items()}


def _scores(values: Mapping[str, Any]) -> dict[str, float]:
    """Without facts that are no metrics, which lm-eval names ``metric,filter``."""
    scores = {}
    for key, value in values.items():
        name, _, filtered_by = key.partition(",")
        if isinstance(value, int | float) and not isinstance(value, bool) and filtered_by:
            scores[name if filtered_by == "none" else f"{name} ({filtered_by})"] = float(value)
    return scores


def expand(tasks: Sequence[str], known: Sequence[str]) -> list[str]:
    """``tasks`` with ``paper`` and patterns expanded, each name once. Raises `DataError` for an unknown name."""
    names: dict[str, None] = {}
    for task in _members(tasks):
        matches = matching(known, task)
        if not matches:
            # Not the list of all, which are thousands.
            raise DataError(
                f"unknown task '{task}'{near(task, [*known, 'paper'])}; 'lm_eval ls tasks' lists all, --set "
                "tasks.include_path=DIR adds your own"
            )
        names.update(dict.fromkeys(matches))
    if not names:
        raise DataError("no task was named")
    return list(names)


def _members(names: Sequence[str]) -> list[str]:
    return [member for name in names for member in (PAPER if name == "paper" else (name,))]


def _task_manager() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MissingExtraError("lm-eval", "evaluate") from None
    return TaskManager


@cache
def builtin_manager() -> Any:
    """lm-eval's index of its own tasks, cached, as reading their ten thousand files takes seconds."""
    return _task_manager()()


def _manager(names: Sequence[str], include_path: Path | None) -> Any:
    if include_path is None:
        return builtin_manager()
    if not include_path.is_dir():
        raise DataError(f"tasks.include_path = {include_path}: no such directory")
    own = _task_manager()(include_path=str(include_path), include_defaults=False)
    if set(_members(names)) <= set(own.all_subtasks):
        return own
    return _task_manager()(include_path=str(include_path))


def _load(manager: Any, name: str) -> list[Any]:
    """The task objects of one name, with their data loaded."""
    # The libraries that load data raise errors of many types.
    try:
        loaded = manager.load([name])
    except Exception as error:
        raise DataError(
            f"the data of task '{name}' cannot be loaded: {first_line(error)}; without the hub, give task files "
            "that read local data with --set tasks.include_path=DIR"
        ) from error
    return [*loaded.get("groups", {}).values()] or [*loaded["tasks"].values()]
