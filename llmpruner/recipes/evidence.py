"""What a report shows of a checkpoint, read from its folder, the recipe that made it, and files of results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..discovery.graph import build_graph
from ..discovery.structure import load_structure
from ..errors import DataError, ModelError, UnsupportedModelError, first_line
from ..evaluation.base import Row
from ..evaluation.costs import size
from ..evaluation.evaluate import Evaluation, side_by_side
from ..files import read_json
from ..models.meta import meta_model
from ..models.record import RECORD_FILE, RUN_FILE
from ..models.surgery import cut
from ..pruning.budgets.cached_bytes import bytes_per_token
from ..report.base import DENSE, Costs, Evidence, Measurements, ReportSubject
from .run import RESULTS
from .state import STATE

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..models.model import Structure
    from ..plugins.catalog import Catalog
    from ..structure.coupling import CouplingGraph

_MADE_BY = ("prune", "recover")


@dataclass(frozen=True)
class _Place:
    """``checkpoint``: the folder that a report is about. ``recipe``: the output of the recipe that made it, None
    without one; ``steps``: its steps, in the order in which they were done, name → record."""

    checkpoint: Path
    recipe: Path | None = None
    steps: Mapping[str, Mapping[str, Any]] | None = None

    @property
    def name(self) -> str:
        return self.checkpoint.name or self.checkpoint.resolve().name


def find(directory: Path) -> _Place:
    """The checkpoint that ``directory`` is, or, for the output of a recipe, its last one. Raises `ModelError`."""
    if (directory / STATE).is_file():
        steps = read_json(directory / STATE).get("steps", {})
        made = [name for name, step in steps.items() if step["inputs"]["command"] in _MADE_BY]
        there = [directory / name for name in made if (directory / name / RECORD_FILE).is_file()]
        if not there:
            raise ModelError(f"the recipe in '{directory}' has made no checkpoint yet; run it first")
        return _Place(there[-1], directory, steps)
    if not (directory / RECORD_FILE).is_file():
        raise ModelError(
            f"'{directory}' is no checkpoint of llmpruner, nor the output of a recipe; report takes what prune, "
            "recover or run wrote"
        )
    above = directory.resolve().parent
    if (above / STATE).is_file():
        steps = read_json(above / STATE).get("steps", {})
        if directory.resolve().name in steps:
            return _Place(directory, above, steps)
    return _Place(directory)


def json_value(path: Path, expected: str) -> Any:
    """The JSON value in a file that a user names. ``expected``: what it should be. Raises `DataError`."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or first_line(error)}") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON; expected {expected}") from error


def is_evaluation(value: Any) -> bool:
    """Whether a JSON value has the form of what ``evaluate --json`` writes."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "name" in one for one in value)


@dataclass(frozen=True)
class ResultsFile:
    """A file that ``evaluate --json`` or ``bench --json`` wrote. ``value``: a list, or an object with ``cases``."""

    path: Path
    value: Any

    @property
    def names(self) -> list[str]:
        """Of the models, as the command had them."""
        found = (
            self.value if isinstance(self.value, list) else [m for case in self.value["cases"] for m in case["models"]]
        )
        return list(dict.fromkeys(one["name"] for one in found))

    @classmethod
    def read(cls, path: Path) -> ResultsFile:
        """Raises `DataError` for any other file."""
        written = "what `llmpruner evaluate --json` or `llmpruner bench --json` wrote"
        value = json_value(path, written)
        if not is_evaluation(value) and not (isinstance(value, dict) and "cases" in value):
            raise DataError(f"{path} is not {written}")
        return cls(path, value)


def subjects_of(directories: Sequence[Path], files: Sequence[ResultsFile], catalog: Catalog) -> list[ReportSubject]:
    """All that is known of the checkpoints in ``directories``. ``files``: results of which those count that have a
    model by its name or folder. Raises `ModelError`, and `DataError` for a file that has results of none of them."""
    used: set[Path] = set()
    subjects = [_subject(directory, files, catalog, used) for directory in directories]
    for file in files:
        if file.path not in used:
            names = ", ".join(f"'{name}'" for name in file.names[:4])
            raise DataError(
                f"{file.path} has no results of {', '.join(str(place) for place in directories)}; it has those of "
                f"{names or 'no model'}: measure the checkpoint by the path where it is now, or leave the file out"
            )
    return subjects


def _subject(directory: Path, files: Sequence[ResultsFile], catalog: Catalog, used: set[Path]) -> ReportSubject:
    """``used``: gets the paths of the ``files`` that have results of the checkpoint."""
    place = find(directory)
    structure = load_structure(str(place.checkpoint), catalog)
    dense, own = _costs(structure, place.checkpoint)
    measured, benches, answers = _of_recipe(place, catalog)
    base = structure.plans[0].base.model if structure.plans else ""
    names = _Names(place, base, (structure.record or {}).get("base_path"))
    for file in files:
        if isinstance(file.value, list):
            try:
                found = _measurements([(names.shown(one["name"]), one) for one in file.value], place.name, catalog)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise DataError(
                    f"{file.path} has results that are not as `llmpruner evaluate --json` writes them "
                    f"({type(error).__name__}: {first_line(error)})"
                ) from error
            if found:
                measured.append(found)
                used.add(file.path)
        elif found_bench := _bench(file.value, names, place.name):
            benches.append(found_bench)
            used.add(file.path)
    evidence = Evidence(
        place.name, dense, own, tuple(measured), tuple(benches), tuple(answers), _runs(place), _steps(place)
    )
    return ReportSubject(
        f"{place.name}, pruned from {Path(base).name or base}", structure.graph, structure.record or {}, evidence
    )


@dataclass(frozen=True)
class _Names:
    """How models of a file of results are named on the page. ``base``: the dense model, as the plan names it; ``path``:
    the absolute path of its files, None where they are not local."""

    place: _Place
    base: str
    path: str | None

    def shown(self, name: str) -> str | None:
        """``dense``, the name of the checkpoint, or None for other models."""
        if Path(name).resolve() == self.place.checkpoint.resolve():
            return self.place.name
        return DENSE if name in (self.base, DENSE) or str(Path(name).resolve()) == self.path else None


def _measurements(
    found: Sequence[tuple[str | None, Mapping[str, Any]]], name: str, catalog: Catalog, text: str | None = None
) -> Measurements | None:
    """Of those models that have a name; None where ``name`` is not among them."""
    known = [(shown, one) for shown, one in found if shown is not None]
    if name not in (shown for shown, _ in known):
        return None
    evaluations = [_evaluation(shown, one, catalog) for shown, one in known]
    named = next((one["perplexity"].get("text") for _, one in known if one.get("perplexity")), None)
    lines = tuple(side_by_side(evaluations))
    return Measurements(tuple(n for n, _ in known), tuple(one for _, one in known), lines, text or named)


def _evaluation(name: str, found: Mapping[str, Any], catalog: Catalog) -> Evaluation:
    """With the rows that the metrics give; those of a metric that is not installed are its numbers."""
    results = {key: value for key, value in found.items() if isinstance(value, Mapping) and value}
    rows: list[Row] = []
    for key, value in results.items():
        if key in catalog.metrics:
            rows += catalog.create(catalog.metrics, key).rows(value)
        else:
            rows += [Row(f"{key} {name}", number) for name, number in value.items() if isinstance(number, float)]
    return Evaluation(name, results, tuple(rows))


def _bench(found: Mapping[str, Any], names: _Names, own: str) -> Mapping[str, Any] | None:
    """With the names of the page, and without models that are not on it; None where ``own`` is not among them."""
    cases = []
    for case in found["cases"]:
        models = [{**one, "name": shown} for one in case["models"] if (shown := names.shown(one["name"])) is not None]
        if own not in (one["name"] for one in models):
            return None
        cases.append({**case, "models": models})
    return {**found, "cases": cases}


def _of_recipe(
    place: _Place, catalog: Catalog
) -> tuple[list[Measurements], list[Mapping[str, Any]], list[tuple[Mapping[str, str], ...]]]:
    measured: list[Measurements] = []
    benches: list[Mapping[str, Any]] = []
    answers: list[tuple[Mapping[str, str], ...]] = []
    if place.recipe is None or place.steps is None:
        return measured, benches, answers
    for name, step in place.steps.items():
        file, command = place.recipe / name / RESULTS, step["inputs"]["command"]
        if command not in ("evaluate", "bench", "generate") or not file.is_file():
            continue
        value = json.loads(file.read_text(encoding="utf-8"))
        if command == "evaluate":
            text = step["inputs"]["settings"].get("perplexity")
            if found := _measurements([(one["name"], one) for one in value], place.name, catalog, text):
                measured.append(found)
        elif command == "bench":
            if all(place.name in (one["name"] for one in case["models"]) for case in value["cases"]):
                benches.append(value)
        elif place.name in (one["name"] for one in value):
            answers.append(tuple(value))
    return measured, benches, answers


def _runs(place: _Place) -> tuple[Mapping[str, Any], ...]:
    """Of all checkpoints of a recipe up to this one; without a recipe, of this one and those beside it that it was made
    from."""
    if place.recipe is not None and place.steps is not None:
        names = list(place.steps)
        made = [place.recipe / name for name in names[: names.index(place.name) + 1]]
    else:
        made = _line(place.checkpoint)
    return tuple(read_json(folder / RUN_FILE) for folder in made if (folder / RUN_FILE).is_file())


def _line(folder: Path) -> list[Path]:
    """The checkpoints that one was made from, oldest first, as far as they are there, and itself."""
    found = [folder]
    while (found[0] / RUN_FILE).is_file():
        before = Path(read_json(found[0] / RUN_FILE)["model"])
        if not (before / RECORD_FILE).is_file() or before.resolve() in [one.resolve() for one in found]:
            break
        found.insert(0, before)
    return found


def _steps(place: _Place) -> tuple[Mapping[str, Any], ...]:
    return tuple(
        {"name": name, "command": step["inputs"]["command"], "seconds": step["seconds"]}
        for name, step in (place.steps or {}).items()
    )


def _costs(structure: Structure, folder: Path) -> tuple[Costs, Costs]:
    """Of the dense model and of the pruned one, which are built without weights."""
    graph = build_graph(structure.family, structure.config)
    model = meta_model(structure.config)
    dense = _costs_of(model, graph)
    dtype = read_json(folder / "config.json").get("dtype")
    if dtype is not None:
        model.to(_dtype(dtype))
    for plan in structure.plans:
        graph = cut(model, graph, plan.kept, structure.family)
    return dense, _costs_of(model, graph)


def _dtype(name: str) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, name)
    return found


def _costs_of(model: PreTrainedModel, graph: CouplingGraph) -> Costs:
    found = size(model, graph)
    try:
        cache = sum(bytes_per_token(model, graph))
    except UnsupportedModelError:  # an architecture whose cache does not grow with the tokens, or not on this device
        cache = None
    return Costs(
        found.parameters, found.decoder_parameters, found.weight_bytes, found.macs_per_token, found.context, cache
    )
