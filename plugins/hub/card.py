"""The model card of a pruned checkpoint, from its record."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from jinja2 import Environment, PackageLoader, StrictUndefined

from llmpruner import CheckpointError, PruningPlan, SettingsError, Structure, build_graph, loss_text, read_json

CARD_FILE = "README.md"
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def model_card(
    structure: Structure,
    repo: str,
    record: Mapping[str, Any],
    *,
    base: str | None = None,
    license: str | None = None,
    evaluations: Any = None,
) -> str:
    """The text of ``README.md``, with metadata that the hub reads.

    ``record``: of the checkpoint, as it is published. ``base``: the hub id of the dense model; None where it is not
    known. ``evaluations``: of `llmpruner.evaluate`. Raises `CheckpointError` for a record without a plan.
    """
    if not structure.plans:
        raise CheckpointError("the record of the checkpoint has no plan, so there is nothing to write a card from")
    local = (structure.record or {}).get("base_path")
    if license is not None and not _LICENCE.fullmatch(license):
        raise SettingsError(f"--license '{license}': expected an identifier in lower case, such as apache-2.0, mit")
    licence = licence_of(base, local) if license is None else {"license": license}
    tags = ["llmpruner", "pruned"]
    data = ModelCardData(
        base_model=base, library_name="transformers", pipeline_tag="text-generation", tags=tags, **licence
    )
    config = read_json(Path(structure.path or structure.ref) / "config.json")
    dense, graph = build_graph(structure.family, structure.config), structure.graph
    decoder = (dense.decoder_parameters, graph.decoder_parameters)
    parameters = (dense.total_parameters, graph.total_parameters)
    plans = [PruningPlan.model_validate(plan) for plan in record["plans"]]
    environment = Environment(
        loader=PackageLoader("llmpruner_hub", "."), trim_blocks=True, lstrip_blocks=True, autoescape=False,
        undefined=StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template("card.md.j2").render(
        metadata=data.to_yaml(),
        repo=repo,
        hub_id=base,
        base=base or Path(plans[0].base.model).name,
        licence=licence,
        headline=(*parameters, "parameters") if len(set(decoder)) == 1 else (*decoder, "decoder's parameters"),
        decoder=decoder,
        parameters=parameters,
        shim="llmpruner" in config,
        quantised=(config.get("quantization_config") or {}).get("quant_method"),
        steps=[(plan, *plan.table()) for plan in plans],
        recoveries=record.get("recovery") or (),
        loss_text=loss_text,
        evaluations=evaluations,
        names=[Path(each.name).name for each in evaluations or ()],
        version=record.get("llmpruner", ""),
    )


def base_of(record: Mapping[str, Any]) -> str | None:
    """The hub id of the dense model in a record; None for a local model."""
    plans = record.get("plans") or ()
    name = str(plans[0]["base"]["model"]) if plans and "base_path" not in record else ""
    return name if _HUB_ID.fullmatch(name) else None


def licence_of(base: str | None, path: str | None) -> dict[str, Any]:
    """The licence that the card of the dense model states, as keys of a card's metadata: in its local directory
    ``path``, or in the cache of the hub model ``base``. Empty where no such card is on this machine, or it states
    none."""
    cached = None if base is None else try_to_load_from_cache(base, CARD_FILE)
    files = [Path(path) / CARD_FILE] if path else []
    # The cache answers with a mark of its own for files that are known not to exist.
    files += [Path(cached)] if isinstance(cached, str) else []
    for file in files:
        if not file.is_file():
            continue
        try:
            data = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
        except Exception as error:  # cards have YAML by many hands
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"the licence cannot be read from {file}: {reason}; use --license") from error
        if isinstance(data.license, str):
            return {key: getattr(data, key) for key in ("license", "license_name", "license_link")}
    return {}
