"""What a report shows of checkpoints, from their folders, the recipe that made them, and files of results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..catalog import Catalog
from ..discovery.cut import cut
from ..discovery.groups import build_graph
from ..discovery.opening import Opener
from ..engine.stages import read_step
from ..errors import DataError, ModelError, UnsupportedModelError, first_line
from ..evaluation.evaluate import Evaluation, Evaluations, Metric
from ..evaluation.metrics import size
from ..files import read_json, weights_size
from ..models.meta import meta_model
from ..models.record import RECORD_FILE, RESULTS_FILE, RUN_FILE
from ..models.reference import model_identity
from ..pruning.budgets import bytes_per_token
from .base import DENSE, Costs, ReportSubject

if TYPE_CHECKING:
    from ..models.model import Structure
    from ..structure.coupling import CouplingGraph


def report_subjects(directories: Sequence[Path], files: Sequence[Path], opener: Opener) -> list[ReportSubject]:
    """What is known of checkpoints; the output of a recipe stands for its last one. ``files``: of results. Raises
    `ModelError` for a directory that is neither, `DataError` for a file that has results of none."""
    places = [_place(directory) for directory in directories]
    results = {path: read_results(path) for path in files}
    checkpoints = [checkpoint.absolute() for checkpoint, _ in places]
    resolved = {checkpoint.resolve() for checkpoint in checkpoints}
    for path, value in results.items():
        if not any(Path(model["name"]).resolve() in resolved for model in _models(value)):
            hint = "measure the checkpoint by its present path, or leave the file out"
            raise DataError(f"{path} has no results of {', '.join(map(str, checkpoints))}; {hint}")
    named = zip(checkpoints, _names(checkpoints), places, strict=True)
    return [_subject(checkpoint, name, steps, results, opener) for checkpoint, name, (_, steps) in named]


def _names(checkpoints: Sequence[Path]) -> list[str]:
    """The names of folders, with the folder above or the whole path where several are alike."""
    for names in ([path.name for path in checkpoints], [f"{path.parent.name}/{path.name}" for path in checkpoints]):
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in checkpoints]


def _place(directory: Path) -> tuple[Path, list[Mapping[str, Any]]]:
    """The checkpoint that ``directory`` is, or the last one of a recipe's output; and the steps of its recipe."""
    if steps := _steps_in(directory):
        folders = (step["folder"] for step in steps if step["command"] in ("prune", "recover"))
        checkpoints = [folder for folder in folders if (folder / RECORD_FILE).is_file()]
        if not checkpoints:
            raise ModelError(f"the recipe in '{directory}' has made no checkpoint yet; run it first")
        return checkpoints[-1], steps
    if not (directory / RECORD_FILE).is_file():
        raise ModelError(f"'{directory}' is neither a pruned checkpoint nor the output of a recipe")
    return directory, _steps_in(directory.resolve().parent) if read_step(directory) else []


def _steps_in(output: Path) -> list[Mapping[str, Any]]:
    """The steps of a recipe as of `read_step`, in order, with their ``folder`` and ``command``."""
    steps = [
        {**step, "command": step["inputs"]["command"], "folder": file.parent}
        for file in output.glob(f"*/{RUN_FILE}")
        if (step := read_step(file.parent)) and step["name"] == file.parent.name  # else its result is not in place yet
    ]
    return sorted(steps, key=lambda step: step["number"])


def read_results(path: Path) -> Any:
    """The JSON value that ``evaluate --json`` (a list) or ``bench --json`` (an object) wrote. Raises `DataError`."""
    with as_written(path):
        value = json.loads(path.read_bytes())
        names = [model["name"] for model in _models(value)]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("it names no models")
        return value


def _models(results: Any) -> list[dict[str, Any]]:
    """The results of each model of ``evaluate``, or those of the first case of ``bench``."""
    models: list[dict[str, Any]] = results if isinstance(results, list) else results["cases"][0]["models"]
    return models


def _subject(
    checkpoint: Path, name: str, steps: Sequence[Mapping[str, Any]], files: Mapping[Path, Any], opener: Opener
) -> ReportSubject:
    structure = opener.structure(checkpoint)
    base, record = structure.plans[0].base.model, structure.record or {}
    measured: dict[str, list[Any]] = {"evaluate": [], "bench": [], "generate": []}

    def add(command: str, results: Any, rename: Callable[[str], str | None]) -> None:
        results = _renamed(results, rename)
        if name in (model["name"] for model in _models(results)):
            measured[command].append(_evaluations(results, opener.catalog) if command == "evaluate" else results)

    def by_path(model: str) -> str | None:
        path = Path(model).resolve()
        is_dense = model in (base, DENSE) or str(path) == record.get("base_path")
        return name if path == checkpoint.resolve() else DENSE if is_dense else None

    # A step that is no longer in the recipe may have measured other weights of this name.
    identity = model_identity(structure.reference) if steps else None
    for step in steps:
        if step["command"] in measured and step["inputs"]["models"].get(checkpoint.name) == identity:
            results = read_results(step["folder"] / RESULTS_FILE)
            add(step["command"], results, lambda model: name if model == checkpoint.name else model)
    for path, results in files.items():
        with as_written(path):
            add("evaluate" if isinstance(results, list) else "bench", results, by_path)
    dense, costs = _costs(structure, checkpoint)
    return ReportSubject(
        f"{name}, pruned from {Path(base).name or base}", name, structure.graph, record, structure.plans, dense, costs,
        tuple(measured["evaluate"]), tuple(measured["bench"]), tuple(map(tuple, measured["generate"])),
        _runs(checkpoint), tuple(steps),
    )  # fmt: skip


def _renamed(results: Any, rename: Callable[[str], str | None]) -> Any:
    """``results`` with other names of models, without those that ``rename`` gives None."""
    if isinstance(results, dict):
        cases = [{**case, "models": _renamed(case["models"], rename)} for case in results["cases"]]
        return {**results, "cases": cases}
    return [{**model, "name": new} for model in results if (new := rename(model["name"])) is not None]


@contextmanager
def as_written(file: Path | str) -> Iterator[None]:
    """Raise `DataError` where ``file`` cannot be read, or values in it are missing or of another type."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or first_line(error)}") from error
    except (ValueError, RecursionError, TypeError, LookupError, AttributeError, ZeroDivisionError) as error:
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"{file} is not as `evaluate --json` or `bench --json` writes it ({problem})") from error


def read_evaluations(file: Path, catalog: Catalog) -> Evaluations:
    """What ``evaluate --json`` wrote. Raises `DataError`."""
    with as_written(file):
        return _evaluations(read_results(file), catalog)


def _evaluations(models: Sequence[Mapping[str, Any]], catalog: Catalog) -> Evaluations:
    """What ``evaluate --json`` wrote, without metrics that are not installed."""
    evaluations = []
    for model in models:
        results = {key: value for key, value in model.items() if value and key in catalog[Metric]}
        rows = [row for key, value in results.items() for row in catalog[Metric].create(key).rows(value)]
        evaluations.append(Evaluation(model["name"], results, tuple(rows)))
    return Evaluations(evaluations)


def _runs(checkpoint: Path) -> tuple[Mapping[str, Any], ...]:
    """``run.json`` of this checkpoint and of those that it was made from, as far as they are there, oldest first."""
    folder, runs = checkpoint, dict[Path, Any]()
    # A checkpoint may have been moved to where its own model was.
    while folder not in runs and (folder / RUN_FILE).is_file() and (folder / RECORD_FILE).is_file():
        runs[folder] = read_json(folder / RUN_FILE)
        folder = Path(runs[folder]["model"])
    return tuple(reversed(runs.values()))


def _costs(structure: Structure, folder: Path) -> tuple[Costs, Costs]:
    """Of the dense model and of the pruned one, which are built without weights."""
    graph, model = build_graph(structure.family, structure.config), meta_model(structure.config)

    def costs(place: str | Path) -> Costs:
        try:
            cache = sum(bytes_per_token(model, graph))
        except UnsupportedModelError:  # the cache does not grow with the tokens, or cannot be made on this device
            cache = None
        files = weights_size(Path(place)) if place else 0
        return Costs(
            **asdict(size(model, graph)), cache_bytes=cache, file_bytes=files or None, q4_bytes=q4_bytes(graph)
        )

    dense = costs((structure.record or {}).get("base_path", ""))
    if (dtype := read_json(folder / "config.json").get("dtype")) is not None:
        import torch

        model.to(getattr(torch, dtype))
    for plan in structure.plans:
        graph = cut(model, graph, plan.kept, structure.family)
    return dense, costs(folder)


def q4_bytes(graph: CouplingGraph) -> int:
    """Bytes of a GGUF file of type q4_0, as its exporter writes it: in the decoder 18 bytes for 32 weights of a row, 34
    for those of tokens, 16 bits where rows hold no whole blocks."""
    total = 0
    for name, shape in graph.shapes.items():
        if name not in graph.ties:
            whole = 18 / 32 if graph.is_decoder(name) else 34 / 32
            of_weight = 4 if len(shape) == 1 else whole if shape[-1] % 32 == 0 else 2
            total += round(prod(shape) * of_weight)
    return total
