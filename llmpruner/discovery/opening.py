"""Opening what users name: structures without weights, models in memory, and the dense model of a pruned one."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import exists
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from ..errors import (
    CheckpointError,
    LlmprunerError,
    ModelError,
    PluginError,
    SettingsError,
    first_line,
    no_tokenizer,
    not_pruned,
)
from ..files import WEIGHTS
from ..models.family import AUTO
from ..models.messages import ALLOW, from_pretrained, in_one_line, quiet_transformers
from ..models.meta import register_model_class
from ..models.model import Model, Structure
from ..models.numbers import check_device, dtype_of, widened
from ..models.opening import load_model, open_streamed, pruned_class
from ..models.record import read_any_record, read_record, sampled_sha256
from ..models.reference import Reference, adapter_base, resolve
from ..models.tokenizer import brings_tokenizer, load_tokenizer
from ..progress import QUIET, Progress
from ..settings import LoadSettings, settings_from
from ..structure.kept import restrict
from ..structure.plan import PruningPlan, structure_of
from ..values import refusal
from .groups import build_graph

if TYPE_CHECKING:
    from ..engine.ranks import Ranks
    from ..plugins.catalog import Catalog

_LOG = logging.getLogger("llmpruner")

Source = str | Path | Structure
"""A reference to a model, its structure (`discover`), or the model with its weights (`load`)."""


@dataclass(frozen=True)
class Opener:
    """Opens models with the plugins of ``catalog`` and the settings of ``load``."""

    catalog: Catalog
    load: LoadSettings
    progress: Progress

    def of_ranks(self, ranks: Ranks) -> Opener:
        """For a command of several processes, of which the first alone prints messages."""
        return self if ranks.first else replace(self, progress=QUIET)

    def structure(self, source: Source) -> Structure:
        """The structure of ``source``. Raises `ModelError` for a half-changed model, `SettingsError` for no source."""
        if isinstance(source, Model):
            source.check_whole()
        if isinstance(source, Structure):
            return source
        if not isinstance(source, (str, Path)):
            raise SettingsError(f"expected a path, hub id or result of llmpruner.load, got {type(source).__name__}")
        structure = load_structure(str(source), self.catalog, self.load)
        if structure.family.name == AUTO and self.load.family is None and not structure.plans:
            self.progress.status(f"structure of this {structure.config.model_type} model discovered by tracing")
        return structure

    def as_stored(self, source: Source) -> Model:
        """A model in memory; unless a dtype was chosen, float16 stays float16, on a CPU too."""
        opened, opener = self.structure(source), self
        if widened(opened, self.load) is not None:
            opener = replace(self, load=self.load.model_copy(update={"dtype": "float16"}))
        return opener.weights(opened)

    def weights(self, opened: Structure, *, streamed: bool = False, scratch: Path | None = None) -> Model:
        """``opened`` with its weights, in memory or ``streamed``; a model as it is. ``scratch``: see `open_streamed`.
        Raises `ModelError` for a streamed model, unless ``streamed``."""
        if isinstance(opened, Model):
            if opened.streamed is not None and not streamed:
                raise ModelError(f"'{opened.ref}' is read layer by layer; pass its folder")
            return opened
        check_device(self.load.device)
        if streamed:
            self.progress.status(f"{opened.ref} is read layer by layer")
            return open_streamed(opened, self.load, scratch)
        self.progress.status(f"loading {opened.ref}")
        return load_model(opened, self.load)

    def say_widened(self, opened: Structure) -> None:
        """Tell the user where a result will be saved in a wider dtype than the model is stored in."""
        if not isinstance(opened, Model) and (line := widened(opened, self.load)):
            self.progress.status(line)

    def tokenizer(self, opened: Structure) -> Any | None:
        """The tokenizer of a model, without its weights; None where it has none."""
        return opened.tokenizer if isinstance(opened, Model) else load_tokenizer(opened, self.load)

    def has_tokenizer(self, opened: Structure) -> bool:
        """Whether a model has a tokenizer, or its folder the files of one."""
        return opened.tokenizer is not None if isinstance(opened, Model) else brings_tokenizer(opened.ref, self.catalog)

    def readable(self, source: Source, purpose: str) -> Structure:
        """`structure`. Raises `ModelError` for a model without a tokenizer, which cannot ``purpose``."""
        structure = self.structure(source)
        if not self.has_tokenizer(structure):
            raise no_tokenizer(f"model '{structure.ref}'", f"it cannot {purpose}")
        return structure


def listed(models: Source | Sequence[Source]) -> list[Source]:
    """One model or several, as a list. Raises `SettingsError` for none."""
    several = isinstance(models, Iterable) and not isinstance(models, str)
    sources: list[Source] = list(models) if several else [models]  # type: ignore[arg-type, list-item]
    if not sources:
        raise SettingsError("no model is named; name at least one")
    return sources


def load_structure(text: str, catalog: Catalog, options: LoadSettings | None = None) -> Structure:
    """The structure of the model ``text``, pruned or not, without reading its weights."""
    options = options or LoadSettings()
    base = adapter_base(Path(text))
    if base is not None:
        return _adapted(load_structure(base, catalog, options), text)
    ref = resolve(text, catalog)
    catalog.register_models()
    record = read_record(ref.directory) if ref.directory.is_dir() and not ref.gguf_file else None
    if record is not None:
        return _pruned_structure(ref, record, catalog, options)
    with in_one_line(ref):
        revision = ref.commit(options.revision)
    config = _read_config(ref, options, revision)
    if getattr(config, "llmpruner", None) is not None:
        raise ModelError(
            f"'{text}' was pruned to layers of different sizes, and llmpruner.json, which says how, is not there; "
            "download the whole repository (hf download REPO --local-dir DIR), and name its folder"
        )
    family = catalog.family_for(config, options.family or (ref.reader.family if ref.reader else None))
    try:
        graph = build_graph(family, config)
        return Structure(text, config, family, graph, path=ref.local_path, revision=revision, place=ref)
    except LlmprunerError:
        raise
    except Exception as error:  # of the family, or of the model's class, which refuses its configuration
        raise ModelError(
            f"family '{family.name}' finds no structure in the configuration of '{text}' "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def _adapted(base: Structure, text: str) -> Structure:
    """``base`` with the adapter in folder ``text``, which names the base."""
    if base.adapter is not None:
        raise ModelError(f"'{text}' is an adapter for an adapter, '{base.ref}'; merge that into its model first")
    folder, record = Path(text), base.record
    if record is not None:
        trained = (read_any_record(folder) or {}).get("recovery")
        # With adapters of other programs, nothing but their name tells that weights are not those of the cut.
        record = {**record, "adapters": [*record.get("adapters", ()), folder.resolve().name]}
        if trained:
            record["recovery"] = trained
    return replace(base, ref=text, record=record, path=str(folder.resolve()), adapter=folder)


def _pruned_structure(ref: Reference, record: Mapping[str, Any], catalog: Catalog, options: LoadSettings) -> Structure:
    try:
        values = dict(PreTrainedConfig._decode_special_floats(dict(record["base_config"])))
        if values["model_type"] not in CONFIG_MAPPING and "auto_map" in values:
            # Pruned from a model with code in its checkpoint, of which this one contains a copy.
            if not options.trust_remote_code:
                raise ModelError(f"'{ref.text}' needs code that the checkpoint brings; {ALLOW}")
            pruned_class(ref.location)
        plans = tuple(PruningPlan.model_validate(plan) for plan in record["plans"])
        if options.family is None and plans and plans[0].family not in catalog.families:
            raise PluginError(
                f"'{ref.text}' is of family '{plans[0].family}', which no plugin here adds; install the one that does"
            )
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        family = catalog.family_for(config, options.family or (plans[0].family if plans else None))
        graph = build_graph(family, config)
        for plan in plans:
            plan.check(graph)
            graph = restrict(graph, plan.kept)
        return Structure(ref.text, config, family, graph, plans, record, path=ref.local_path, place=ref)
    except LlmprunerError:
        raise
    except ValidationError as error:
        raise CheckpointError(f"{ref.text}/llmpruner.json is damaged: plan: {refusal(error)}") from error
    except Exception as error:
        # Classes of configurations raise exceptions of any type for unexpected values.
        reason = f"{type(error).__name__}: {first_line(error)}"
        if options.family is not None:
            raise ModelError(
                f"family '{options.family}' does not fit '{ref.text}', or its llmpruner.json is damaged ({reason})"
            ) from error
        raise CheckpointError(f"{ref.text}/llmpruner.json is damaged ({reason})") from error


def _read_config(ref: Reference, options: LoadSettings, revision: str | None) -> PreTrainedConfig:
    if ref.reader is not None:
        with in_one_line(ref):
            return ref.reader.read_config(ref.directory)
    allowed = options.trust_remote_code
    config: PreTrainedConfig = from_pretrained(AutoConfig, ref, revision, trust_remote_code=allowed)
    if allowed:
        with in_one_line(ref), quiet_transformers():
            register_model_class(config, revision)
    return config


def base_record(loaded: Structure) -> dict[str, str]:
    """What ``llmpruner.json`` says of a local dense model: its path and a hash of its weights. Empty for others."""
    if (loaded.record or {}).get("plans") or loaded.path is None:
        return {}
    weights = _sampled_weights(Path(loaded.path))
    return {"base_path": loaded.path} | ({} if weights is None else {"base_weights": weights})


def _sampled_weights(place: Path) -> str | None:
    """SHA-256 over names and `sampled_sha256` of a model's files with weights; None without readable ones."""
    try:
        files = [place] if place.is_file() else sorted(f for f in place.iterdir() if f.suffix in WEIGHTS)
        sums = {file.name: sampled_sha256(file) for file in files}
    except OSError:
        return None
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest() if sums else None


def dense_structure(
    pruned: Structure, catalog: Catalog, load: LoadSettings | None = None, *, named: str | None = None
) -> Structure:
    """The structure of the dense model: ``named``, or the one in the record of ``pruned``. Warns where files are not
    those of the record. Raises `ModelError` where it can't be opened or has other shapes."""
    if not pruned.plans:
        raise not_pruned(pruned.ref)
    base, record = pruned.plans[0].base, pruned.record or {}
    path = record.get("base_path")
    ref = named or (path if isinstance(path, str) and exists(path) else base.model)
    family, revision = (None, None) if named else (pruned.family.name, base.revision)
    options = (load or LoadSettings()).model_copy(update={"family": family, "revision": revision})
    try:
        dense = load_structure(ref, catalog, options)
    except LlmprunerError as error:
        raise ModelError(f"the dense model of '{pruned.ref}', '{ref}', cannot be opened: {error}") from error
    if dense.plans or structure_of(dense.graph) != base.structure:
        raise ModelError(
            f"'{ref}' is not the model that '{pruned.ref}' was pruned from ('{base.model}'): parameters differ in name "
            "or shape"
        )
    recorded = None if named else record.get("base_weights")
    if recorded is not None and dense.path is not None and recorded != _sampled_weights(Path(dense.path)):
        _LOG.warning(
            "the files with weights in '%s' are not those from which '%s' was pruned: another model, or the same one "
            "stored in other files", dense.ref, pruned.ref,
        )  # fmt: skip
    return dense


def placed_as(other: Structure, load: LoadSettings) -> LoadSettings:
    """Settings that load a model in the dtype and on the device that ``other`` has, or will have by ``load``."""
    device = str(other.model.device) if isinstance(other, Model) else load.device
    dtype = str(dtype_of(other, load)).removeprefix("torch.")
    values = {"dtype": dtype, "device": device, "trust_remote_code": load.trust_remote_code}
    return settings_from(LoadSettings, values)
