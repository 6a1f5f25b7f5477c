"""Opening the structure of a model, from its configuration and ``llmpruner.json``, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from ..errors import CheckpointError, LlmprunerError, ModelError, first_line
from ..models.checkpoint import adapter_base
from ..models.messages import in_one_line, quiet_transformers
from ..models.model import Structure
from ..models.record import read_any_record, read_record
from ..models.reference import Reference, resolve
from ..models.remote import ALLOW, pruned_class, register_model_class
from ..settings import LoadSettings
from ..structure.kept import restrict
from ..structure.plan import PruningPlan
from ..values import refusal
from .groups import build_graph

if TYPE_CHECKING:
    from ..plugins.catalog import Catalog


AnyStructure = TypeVar("AnyStructure", bound="Structure")


def load_structure(text: str, catalog: Catalog, options: LoadSettings | None = None) -> Structure:
    """The structure of a model, pruned or not, without reading its weights."""
    options = options or LoadSettings()
    base = adapter_base(Path(text))
    if base is not None:
        return adapted(load_structure(base, catalog, options), text)
    ref = resolve(text, catalog)
    catalog.register_models()
    record = read_record(ref.directory) if ref.directory.is_dir() and not ref.gguf_file else None
    if record is not None:
        return _pruned_structure(ref, record, catalog, options)
    config = _read_config(ref, options)
    family = catalog.family_for(config, options.family or (ref.reader.family if ref.reader else None))
    try:
        return Structure(text, config, family, build_graph(family, config), path=ref.local_path)
    except LlmprunerError:
        raise
    except Exception as error:  # of the model's class, which refuses its configuration
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"no model can be built of the configuration of '{text}' ({reason})") from error


def adapted(base: AnyStructure, text: str) -> AnyStructure:
    """``base`` with the adapter in folder ``text``. Whoever reads the model again by its ``path`` needs both."""
    folder, record = Path(text), base.record
    if record is not None:
        trained = (read_any_record(folder) or {}).get("recovery")
        # With adapters of other programs, nothing but their name tells that weights are not those of the cut.
        record = {**record, "adapters": [*record.get("adapters", ()), folder.resolve().name]}
        if trained:
            record["recovery"] = trained
    return replace(base, ref=text, record=record, path=str(folder.resolve()))


def _pruned_structure(ref: Reference, record: Mapping[str, Any], catalog: Catalog, options: LoadSettings) -> Structure:
    try:
        values = dict(PreTrainedConfig._decode_special_floats(dict(record["base_config"])))
        if values["model_type"] not in CONFIG_MAPPING and "auto_map" in values:
            # Pruned from a model with code in its checkpoint, of which this one contains a copy.
            if not options.trust_remote_code:
                raise ModelError(f"'{ref.text}' needs code that the checkpoint brings; {ALLOW}")
            pruned_class(ref.location)
        plans = tuple(PruningPlan.model_validate(plan) for plan in record["plans"])
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        family = catalog.family_for(config, options.family or (plans[0].family if plans else None))
        graph = build_graph(family, config)
        for plan in plans:
            plan.check(graph)
            graph = restrict(graph, plan.kept)
        return Structure(ref.text, config, family, graph, plans, record, path=ref.local_path)
    except LlmprunerError:
        raise
    except ValidationError as error:
        raise CheckpointError(f"{ref.text}/llmpruner.json is damaged: plan: {refusal(error)}") from error
    except Exception as error:
        # Classes of configurations raise exceptions of any type for unexpected values.
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"{ref.text}/llmpruner.json is damaged ({reason})") from error


def _read_config(ref: Reference, options: LoadSettings) -> PreTrainedConfig:
    if ref.reader is not None:
        return ref.reader.read_config(ref.directory)
    with in_one_line(ref), quiet_transformers(), ref.parsed_once(keep=True):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            ref.location, revision=options.revision, trust_remote_code=options.trust_remote_code, **ref.gguf_argument
        )
        if options.trust_remote_code:
            register_model_class(config, options.revision)
        return config
