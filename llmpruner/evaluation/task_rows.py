"""The two forms of a result of tasks: with the scores of rows in it, as it is kept on disk, and with them beside it, as
``evaluate --json`` writes it, so that all values under ``tasks`` are numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROWS = "rows"
"""Key beside the metrics of a task in the first form. Results that were kept by earlier versions are without."""


def task_values(result: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Task → metric → value, of either form."""
    return {task: {name: value for name, value in of.items() if name != ROWS} for task, of in result.items()}


def task_rows(result: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Task → ``{"sha256": …, "scores": {metric: [score, …]}}``, of a result of the first form, for tasks that have
    scores of rows; see `llmpruner.evaluation.tasks.RowScores`."""
    return {task: of[ROWS] for task, of in result.items() if ROWS in of}


def with_task_rows(
    values: Mapping[str, Mapping[str, float]], rows: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The first form, of what `task_values` and `task_rows` give."""
    return {task: {**of, ROWS: rows[task]} if task in rows else {**of} for task, of in values.items()}
