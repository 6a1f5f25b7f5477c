"""What a report shows of a checkpoint: sizes, measurements and runs, from its folder, the recipe that made it, and
files that ``evaluate --json`` and ``bench --json`` wrote. No weights are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..discovery.groups import build_graph
from ..discovery.structure import load_structure
from ..errors import DataError, ModelError, UnsupportedModelError, first_line
from ..evaluation.base import Row
from ..evaluation.evaluate import Evaluation, Evaluations
from ..evaluation.metrics import size
from ..files import read_json
from ..models.meta import meta_model
from ..models.record import RECORD_FILE, RESULTS_FILE, RUN_FILE, STEP_FILE
from ..models.surgery import cut
from ..pruning.kv_cache import bytes_per_token
from .base import DENSE, Costs, Evidence, Measurements, ReportSubject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..models.model import Structure
    from ..plugins.catalog import Catalog
    from ..structure.coupling import CouplingGraph


@dataclass(frozen=True)
class ReportPlace:
    """``checkpoint``: the folder that a report is about. ``steps``: ``step.json`` of all steps of the recipe that made
    it, with their ``folder``, in their order; empty without a recipe."""

    checkpoint: Path
    steps: tuple[Mapping[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Of the checkpoint on the page."""
        return self.checkpoint.name or self.checkpoint.resolve().name


def report_place(directory: Path) -> ReportPlace:
    """The checkpoint that ``directory`` is, or, for the output of a recipe, its last one. Raises `ModelError`."""
    if steps := _steps_in(directory):
        pruned = (step["folder"] for step in steps if step["command"] in ("prune", "recover"))
        made = [folder for folder in pruned if (folder / RECORD_FILE).is_file()]
        if not made:
            raise ModelError(f"the recipe in '{directory}' has made no checkpoint yet; run it first")
        return ReportPlace(made[-1], steps)
    if not (directory / RECORD_FILE).is_file():
        raise ModelError(f"'{directory}' is neither a checkpoint that prune or recover wrote nor the output of run")
    steps = _steps_in(directory.resolve().parent) if (directory / STEP_FILE).is_file() else ()
    return ReportPlace(directory, steps)


def _steps_in(output: Path) -> tuple[Mapping[str, Any], ...]:
    if not output.is_dir():
        return ()
    steps = [{**read_json(file), "folder": file.parent} for file in output.glob(f"*/{STEP_FILE}")]
    return tuple(sorted((step for step in steps if "result" in step), key=lambda step: step["number"]))


def read_results(path: Path) -> Any:
    """The JSON value that ``evaluate --json`` (a list) or ``bench --json`` (an object) wrote. Raises `DataError`."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or first_line(error)}") from error
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, list) and value and all(isinstance(each, dict) and "name" in each for each in value):
        return value
    if isinstance(value, dict) and "cases" in value:
        return value
    raise DataError(f"{path} is not what `llmpruner evaluate --json` or `llmpruner bench --json` wrote")


def report_subjects(places: Sequence[ReportPlace], files: Sequence[Path], catalog: Catalog) -> list[ReportSubject]:
    """What is known of the checkpoints. ``files``: of results (`read_results`), which count where they have a
    checkpoint by its name or folder. Raises `DataError` for a file that has results of none."""
    results = {path: read_results(path) for path in files}
    used: set[Path] = set()
    subjects = [_subject(place, results, catalog, used) for place in places]
    for path in results.keys() - used:
        raise DataError(
            f"{path} has no results of {', '.join(str(place.checkpoint) for place in places)}; measure the checkpoint "
            "by its present path, or leave the file out"
        )
    return subjects


def _subject(place: ReportPlace, files: Mapping[Path, Any], catalog: Catalog, used: set[Path]) -> ReportSubject:
    """``used``: gets the paths of the ``files`` that have results of the checkpoint."""
    structure = load_structure(str(place.checkpoint), catalog)
    dense, own = _costs(structure, place.checkpoint)
    base, record = structure.plans[0].base.model, structure.record or {}

    def shown(name: str) -> str | None:
        """The name on the page of a model in a file: the dense one, this one, or None for others."""
        if Path(name).resolve() == place.checkpoint.resolve():
            return place.name
        return DENSE if name in (base, DENSE) or str(Path(name).resolve()) == record.get("base_path") else None

    measured: list[Measurements] = []
    benches: list[Mapping[str, Any]] = []
    answers: list[tuple[Mapping[str, str], ...]] = []
    for step in place.steps:
        results: Any = read_results(step["folder"] / RESULTS_FILE) if step["result"] is None else []
        text = step["inputs"]["settings"].get("perplexity")
        if step["command"] == "evaluate" and (found := measurements(results, place.name, catalog, text)):
            measured.append(found)
        elif step["command"] == "bench" and (bench := _bench(results, place.name)):
            benches.append(bench)
        elif step["command"] == "generate" and place.name in (answer["name"] for answer in results):
            answers.append(tuple(results))
    for path, value in files.items():
        try:
            if isinstance(value, list):
                found, bench = measurements(_renamed(value, shown), place.name, catalog), None
            else:
                cases = [{**case, "models": _renamed(case["models"], shown)} for case in value["cases"]]
                found, bench = None, _bench({**value, "cases": cases}, place.name)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"{type(error).__name__}: {first_line(error)}"
            raise DataError(f"{path} is not as `evaluate --json` or `bench --json` writes it ({problem})") from error
        measured += [found] if found else []
        benches += [bench] if bench else []
        used |= {path} if found or bench else set()
    evidence = Evidence(
        place.name, dense, own, tuple(measured), tuple(benches), tuple(answers), _runs(place),
        tuple({key: step[key] for key in ("name", "command", "seconds")} for step in place.steps),
    )  # fmt: skip
    return ReportSubject(f"{place.name}, pruned from {Path(base).name or base}", structure.graph, record, evidence)


def _renamed(models: Sequence[Mapping[str, Any]], shown: Callable[[str], str | None]) -> list[dict[str, Any]]:
    """With the names of the page, and without models that are not on it."""
    return [{**model, "name": name} for model in models if (name := shown(model["name"])) is not None]


def measurements(
    results: Sequence[Mapping[str, Any]], name: str, catalog: Catalog, text: str | None = None
) -> Measurements | None:
    """What ``evaluate --json`` wrote, as it is on the page; None where ``name`` was not measured. ``text``: that the
    perplexity was measured on."""
    names = tuple(model["name"] for model in results)
    if name not in names:
        return None
    if text is None:
        text = next((model["perplexity"].get("text") for model in results if model.get("perplexity")), None)
    lines = Evaluations(_evaluation(model, catalog) for model in results).lines
    return Measurements(names, tuple(results), tuple(lines), text)


def _evaluation(model: Mapping[str, Any], catalog: Catalog) -> Evaluation:
    """With the rows that the metrics give; those of a metric that is not installed are its numbers."""
    results = {key: value for key, value in model.items() if isinstance(value, Mapping) and value}
    rows: list[Row] = []
    for key, value in results.items():
        if key in catalog.metrics:
            rows += catalog.metrics.create(key).rows(value)
        else:
            rows += [Row(f"{key} {name}", number) for name, number in value.items() if isinstance(number, float)]
    return Evaluation(model["name"], results, tuple(rows))


def _bench(bench: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """None where ``name`` is not in all of its cases."""
    return bench if all(name in (model["name"] for model in case["models"]) for case in bench["cases"]) else None


def _runs(place: ReportPlace) -> tuple[Mapping[str, Any], ...]:
    """``run.json`` of the checkpoints that this one was made from, oldest first, as far as they are there, and of
    itself."""
    folders = [step["folder"] for step in place.steps] or [place.checkpoint]
    if place.steps:
        folders = folders[: [folder.name for folder in folders].index(place.checkpoint.resolve().name) + 1]
    while not place.steps and (folders[0] / RUN_FILE).is_file():
        source = Path(read_json(folders[0] / RUN_FILE)["model"])
        if not (source / RECORD_FILE).is_file() or source.resolve() in (folder.resolve() for folder in folders):
            break
        folders.insert(0, source)
    return tuple(read_json(folder / RUN_FILE) for folder in folders if (folder / RUN_FILE).is_file())


def _costs(structure: Structure, folder: Path) -> tuple[Costs, Costs]:
    """Of the dense model and of the pruned one, which are built without weights."""
    graph = build_graph(structure.family, structure.config)
    model = meta_model(structure.config)
    dense = _costs_of(model, graph)
    if (dtype := read_json(folder / "config.json").get("dtype")) is not None:
        import torch

        model.to(getattr(torch, dtype))
    for plan in structure.plans:
        graph = cut(model, graph, plan.kept, structure.family)
    return dense, _costs_of(model, graph)


def _costs_of(model: PreTrainedModel, graph: CouplingGraph) -> Costs:
    sizes = size(model, graph)
    try:
        cache = sum(bytes_per_token(model, graph))
    except UnsupportedModelError:  # an architecture whose cache does not grow with the tokens, or not on this device
        cache = None
    return Costs(
        sizes.parameters, sizes.decoder_parameters, sizes.weight_bytes, sizes.macs_per_token, sizes.context, cache
    )
