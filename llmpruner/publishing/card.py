"""The model card of a pruned checkpoint, from its record."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from jinja2 import Environment, PackageLoader, StrictUndefined

from ..errors import CheckpointError, SettingsError, first_line
from ..recovery.losses import loss_text
from ..report.plan import cut_tables
from ..structure.plan import PruningPlan

CARD_FILE = "README.md"
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True)
class Licence:
    """As the metadata of a card states it. ``name``, ``link``: of one that has no identifier (``other``)."""

    identifier: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class CardFacts:
    """What a card states besides the record. ``repo``: the repository that it is for. ``base``: the hub id of the dense
    model; None where it is not known. ``licence``: None where it is not known. ``decoder``, ``parameters``: numbers of
    parameters before and after the cuts, in the decoder and in all. ``form``: ``stock`` or ``shim``. ``quantised``: the
    method, None for a model that is not. ``evaluations``: what ``evaluate --json`` wrote, one object per model."""

    repo: str
    base: str | None
    licence: Licence | None
    decoder: tuple[int, int]
    parameters: tuple[int, int]
    form: str
    quantised: str | None = None
    evaluations: Sequence[Mapping[str, Any]] = ()


def model_card(record: Mapping[str, Any], facts: CardFacts) -> str:
    """The text of ``README.md``, with metadata that the hub reads. ``record``: of the checkpoint, as it is published.

    Raises `CheckpointError` for a record without a plan.
    """
    plans = [PruningPlan.model_validate(plan) for plan in record.get("plans") or ()]
    if not plans:
        raise CheckpointError("the record of the checkpoint holds no plan, so that a card has nothing to state")
    licence = facts.licence
    data = ModelCardData(
        base_model=facts.base,
        library_name="transformers",
        license=None if licence is None else licence.identifier,
        license_name=None if licence is None else licence.name,
        license_link=None if licence is None else licence.link,
        pipeline_tag="text-generation",
        tags=["llmpruner", "pruned"],
    )
    environment = Environment(
        loader=PackageLoader("llmpruner.publishing", "."), trim_blocks=True, lstrip_blocks=True, autoescape=False,
        undefined=StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    text = environment.get_template("card.md.j2").render(
        metadata=data.to_yaml(),
        facts=facts,
        base=facts.base or Path(plans[0].base.model).name,
        steps=list(zip(plans, cut_tables(record), strict=True)),
        recoveries=[(one, loss_text(one)) for one in record.get("recovery") or ()],
        rows=_figures(facts.evaluations),
        version=record.get("llmpruner", ""),
    )
    _check(text, data)
    return text


def _check(text: str, data: ModelCardData) -> None:
    """Raise `CheckpointError` unless the hub's library reads from ``text`` the metadata that were written."""
    read = ModelCard(text).data.to_dict()
    if read != data.to_dict():
        raise CheckpointError(f"the metadata of the model card cannot be read back: {read}")


def base_of(record: Mapping[str, Any]) -> str | None:
    """The hub id of the dense model in a record; None for a local model."""
    plans = record.get("plans") or ()
    name = str(plans[0]["base"]["model"]) if plans and "base_path" not in record else ""
    return name if _HUB_ID.fullmatch(name) else None


def licence_of(base: str | None, path: str | None) -> Licence | None:
    """The licence that the card of the dense model states: in its local directory ``path``, or in the cache of the hub
    model ``base``. None where no such card is on this machine, or it states none."""
    cached = None if base is None else try_to_load_from_cache(base, CARD_FILE)
    files = [Path(path) / CARD_FILE] if path else []
    # The cache answers with a mark of its own for files that are known not to exist.
    files += [Path(cached)] if isinstance(cached, str) else []
    for file in files:
        data = _metadata(file) if file.is_file() else None
        if data is not None and isinstance(data.license, str):
            return Licence(data.license, data.license_name, data.license_link)
    return None


def _metadata(file: Path) -> ModelCardData:
    try:
        return ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except Exception as error:  # cards hold YAML by many hands
        raise CheckpointError(
            f"the licence cannot be read from {file} ({first_line(error)}); give --license"
        ) from error


def named_licence(identifier: str) -> Licence:
    """Raises `SettingsError` for text that cannot be an identifier."""
    if not _LICENCE.fullmatch(identifier):
        raise SettingsError(f"--license '{identifier}': expected an identifier in lower case, such as apache-2.0, mit")
    return Licence(identifier)


def _figures(evaluations: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Rows of the table of figures: a label, and a cell for each model; the first row holds their names."""
    if not evaluations:
        return []
    rows = [("", [Path(str(one["name"])).name for one in evaluations])]
    perplexities = [one.get("perplexity") or {} for one in evaluations]
    for key, label in (("perplexity", "perplexity"), ("kl_per_token", "KL divergence from the first, nats per token")):
        if any(found.get(key) is not None for found in perplexities):
            rows.append((label, [_cell(found.get(key)) for found in perplexities]))
    tasks = dict.fromkeys(
        (task, metric)
        for one in evaluations
        for task, values in (one.get("tasks") or {}).items()
        for metric in values
        if not metric.endswith("_stderr")
    )
    for task, metric in tasks:
        found = [(one.get("tasks") or {}).get(task, {}).get(metric) for one in evaluations]
        rows.append((f"{task} {metric}", list(map(_cell, found))))
    return rows


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
