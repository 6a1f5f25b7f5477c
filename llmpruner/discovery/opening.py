"""Opening what users name: structures without weights, models in memory, and the dense model of a pruned one."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os.path import exists
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from ..catalog import Catalog
from ..errors import (
    CheckpointError,
    LlmprunerError,
    ModelError,
    PluginError,
    SettingsError,
    UnsupportedModelError,
    first_line,
    no_tokenizer,
    not_pruned,
)
from ..files import WEIGHTS
from ..models.devices import described, device_of
from ..models.family import AUTO, ModelFamily
from ..models.gguf import SAME, head_difference
from ..models.messages import ALLOW, from_pretrained, in_one_line, quiet_transformers
from ..models.meta import register_model_class
from ..models.model import Model, Structure
from ..models.numbers import dtype_of, stored_dtype, widened
from ..models.opening import load_model, open_streamed, pruned_class
from ..models.record import read_any_record, read_record, sampled_sha256
from ..models.reference import Reference, resolve
from ..models.tokenizer import has_tokenizer, load_tokenizer
from ..progress import QUIET, Progress
from ..settings import LoadSettings, settings_from
from ..structure.kept import restrict
from ..structure.plan import PruningPlan, structure_of
from ..values import count_text, refusal
from .groups import build_graph

_LOG = logging.getLogger("llmpruner")

Source = str | Path | Structure
"""A reference to a model, its structure (`discover`), or the model with its weights (`load`)."""


@dataclass(frozen=True)
class Opener:
    """Opens models with the plugins of ``catalog`` and the settings of ``load``."""

    catalog: Catalog
    load: LoadSettings = field(default_factory=LoadSettings)
    progress: Progress = QUIET

    @property
    def device(self) -> torch.device:
        """Where models compute. Raises `LlmprunerError` for a device that is not there."""
        return device_of(self.load.device)

    def device_for(self, structure: Structure) -> torch.device:
        """Where a model computes, or will."""
        return structure.weights.device if isinstance(structure, Model) else self.device

    def structure(self, source: Source | Reference) -> Structure:
        """The structure of ``source``. Raises `ModelError` for a half-changed model, `SettingsError` for no source."""
        if isinstance(source, Structure):
            if isinstance(source, Model):
                source.check_whole()
            return source
        if isinstance(source, (str, Path)):
            source = resolve(source, self.catalog)
        if not isinstance(source, Reference):
            raise SettingsError(f"expected a path, hub id or result of llmpruner.load, got {type(source).__name__}")
        structure = _structure(source, self)
        if structure.family.name == AUTO and self.load.family is None and not structure.plans:
            self.progress.status(f"structure of this {structure.config.model_type} model discovered by tracing")
        return structure

    def dense_structure(self, pruned: Structure, named: str | None = None) -> Structure:
        """The structure of the dense model: ``named``, or the one in the record of ``pruned``. Warns where files are
        not those of the record. Raises `ModelError` where it can't be opened or has other shapes."""
        if not pruned.plans:
            raise not_pruned(pruned.ref)
        base, record = pruned.plans[0].base, pruned.record or {}
        path = record.get("base_path")
        ref = named or (path if isinstance(path, str) and exists(path) else base.model)
        family, revision = (None, None) if named else (pruned.family.name, base.revision)
        load = self.load.model_copy(update={"family": family, "revision": revision})
        try:
            dense = replace(self, load=load, progress=QUIET).structure(ref)
        except LlmprunerError as error:
            raise ModelError(f"the dense model of '{pruned.ref}', '{ref}', cannot be opened: {error}") from error
        if dense.plans or structure_of(dense.graph) != base.structure:
            other = f"'{ref}' is not the model that '{pruned.ref}' was pruned from ('{base.model}')"
            raise ModelError(f"{other}: parameters differ in name or shape")
        recorded = None if named else record.get("base_weights")
        if recorded is not None and dense.path is not None and recorded != _sampled_weights(Path(dense.path)):
            what = f"the files with weights in '{dense.ref}' are not those from which '{pruned.ref}' was pruned"
            _LOG.warning("%s: another model, or the same one stored in other files", what)
        return dense

    def as_stored(self, source: Source | Reference) -> Model:
        """A model in memory; unless a dtype was chosen, float16 stays float16, on a CPU too."""
        opened = self.structure(source)
        half = self.load.dtype == "auto" and stored_dtype(opened) == torch.float16
        dtype = "float16" if half else self.load.dtype
        return replace(self, load=self.load.model_copy(update={"dtype": dtype})).weights(opened)

    def weights(self, opened: Structure, *, streamed: bool = False, scratch: Path | None = None) -> Model:
        """``opened`` with its weights, in memory or ``streamed``; a model as it is. ``scratch``: see `open_streamed`.
        Raises `ModelError` for a streamed model, unless ``streamed``."""
        if isinstance(opened, Model):
            if opened.streamed is not None and not streamed:
                raise ModelError(f"'{opened.ref}' is read layer by layer; pass its folder")
            return opened
        device = self.device
        if streamed:
            self.progress.status(f"{opened.ref} is read layer by layer")
            return open_streamed(opened, self.load, scratch)
        self.progress.status(f"loading {opened.ref} on {described(device)}")
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
        return opened.tokenizer is not None if isinstance(opened, Model) else has_tokenizer(opened.reference)

    def check_tokenizer(self, opened: Structure, consequence: str) -> None:
        """Raise `ModelError` for a model without a tokenizer, with the ``consequence``: "it cannot be evaluated"."""
        if not self.has_tokenizer(opened):
            raise no_tokenizer(f"model '{opened.ref}'", consequence)


def register_models(catalog: Catalog) -> None:
    """Let every family register its models. One that raises is named in ``catalog.plugins.broken``."""
    families, broken = catalog[ModelFamily], catalog.plugins.broken
    for name, cls in families.items():
        try:
            cls().register_models()
        except Exception as error:  # of the package that the models come from
            reason = f"{type(error).__name__}: {first_line(error)}"
            line = f"family '{name}' ({families.package_of(name)}) cannot register its models: {reason}"
            if line not in broken:
                broken.append(line)


def family_for(catalog: Catalog, config: PreTrainedConfig, name: str | None = None) -> ModelFamily:
    """The family ``name``; by default the only one that matches and that no other match extends, or ``auto``."""
    families = catalog[ModelFamily]
    if name is not None:
        return families[name]()
    matches = [family for cls in families.values() if (family := cls()).matches(config)]
    extended = {family.extends for family in matches}
    candidates = [family for family in matches if family.name not in extended]
    if len(candidates) > 1:
        names = ", ".join(f"{family.name} ({families.package_of(family.name)})" for family in candidates)
        raise UnsupportedModelError(
            f"several families match model type '{config.model_type}': {names}; choose with --family; in plugins, "
            "name the family that is specialised with 'extends', or let 'matches' leave out other models"
        )
    return candidates[0] if candidates else families[AUTO]()


def _structure(reference: Reference, opener: Opener) -> Structure:
    """Of a model, pruned or not, without reading its weights; an adapter's training is added to the record."""
    register_models(opener.catalog)
    record = read_record(reference.directory) if reference.directory.is_dir() and not reference.gguf_file else None
    if record is None:
        return _dense_structure(reference, opener)
    structure = _pruned_structure(reference, record, opener)
    if reference.adapter is None:
        return structure
    # With adapters of other programs, nothing but their name tells that weights are not those of the cut.
    record = {**record, "adapters": [*record.get("adapters", ()), reference.adapter.resolve().name]}
    if trained := (read_any_record(reference.adapter) or {}).get("recovery"):
        record["recovery"] = trained
    return replace(structure, record=record)


def _dense_structure(reference: Reference, opener: Opener) -> Structure:
    load, reader = opener.load, reference.reader
    with in_one_line(reference):
        reference = reference.at_commit(load.revision)
    config = _read_config(reference, load)
    _tie_quantised(reference, config, opener.progress)
    if getattr(config, "llmpruner", None) is not None:
        lacks = f"'{reference.ref}' was pruned to layers of different sizes, and llmpruner.json, which says how, is not"
        advice = "download the whole repository (hf download REPO --local-dir DIR), and name its folder"
        raise ModelError(f"{lacks} there; {advice}")
    family = family_for(opener.catalog, config, load.family or (reader.family if reader else None))
    try:
        return Structure(reference, config, family, build_graph(family, config))
    except LlmprunerError:
        raise
    except Exception as error:  # of the family, or of the model's class, which refuses its configuration
        what = f"family '{family.name}' finds no structure in the configuration of '{reference.ref}'"
        raise ModelError(f"{what} ({type(error).__name__}: {first_line(error)})") from error


def _pruned_structure(reference: Reference, record: Mapping[str, Any], opener: Opener) -> Structure:
    ref, load, families = reference.ref, opener.load, opener.catalog[ModelFamily]
    try:
        values = dict(PreTrainedConfig._decode_special_floats(dict(record["base_config"])))
        if values["model_type"] not in CONFIG_MAPPING and "auto_map" in values:
            # Pruned from a model with code in its checkpoint, of which this one contains a copy.
            if not load.trust_remote_code:
                raise ModelError(f"'{ref}' needs code that the checkpoint brings; {ALLOW}")
            pruned_class(reference.location)
        plans = tuple(PruningPlan.model_validate(plan) for plan in record["plans"])
        if load.family is None and plans and plans[0].family not in families:
            unknown = f"'{ref}' is of family '{plans[0].family}', which no plugin here adds"
            raise PluginError(f"{unknown}; install the one that does")
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        family = family_for(opener.catalog, config, load.family or (plans[0].family if plans else None))
        graph = build_graph(family, config)
        for plan in plans:
            plan.check(graph)
            graph = restrict(graph, plan.kept)
        return Structure(reference, config, family, graph, plans, record)
    except LlmprunerError:
        raise
    except ValidationError as error:
        raise CheckpointError(f"{ref}/llmpruner.json is damaged: plan: {refusal(error)}") from error
    except Exception as error:
        # Classes of configurations raise exceptions of any type for unexpected values.
        reason = f"{type(error).__name__}: {first_line(error)}"
        if load.family is not None:
            misfit = f"family '{load.family}' does not fit '{ref}', or its llmpruner.json is damaged"
            raise ModelError(f"{misfit} ({reason})") from error
        raise CheckpointError(f"{ref}/llmpruner.json is damaged ({reason})") from error


def _read_config(reference: Reference, load: LoadSettings) -> PreTrainedConfig:
    if reference.reader is not None:
        with in_one_line(reference):
            return reference.reader.read_config(reference.directory)
    config: PreTrainedConfig = from_pretrained(AutoConfig, reference, trust_remote_code=load.trust_remote_code)
    if load.trust_remote_code:
        with in_one_line(reference), quiet_transformers():
            register_model_class(config, reference.commit)
    return config


def _tie_quantised(reference: Reference, config: PreTrainedConfig, progress: Progress) -> None:
    """Tie the embedding and the head of a GGUF file that holds one matrix twice, quantised apart."""
    if reference.gguf_file is None or config.tie_word_embeddings:
        return
    difference = head_difference(reference.directory / reference.gguf_file)
    if difference is not None and difference < SAME:
        config.tie_word_embeddings = True
        fewer = count_text(config.vocab_size * config.hidden_size)
        what = f"'{reference.ref}' stores its embedding twice, quantised apart (difference {difference:.1%})"
        progress.status(f"{what}; it is read as one matrix, which are {fewer} parameters fewer")


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


def placed_as(other: Structure, load: LoadSettings) -> LoadSettings:
    """Settings that load a model in the dtype and on the device that ``other`` has, or will have by ``load``."""
    device = str(other.network.device) if isinstance(other, Model) else load.device
    dtype = str(dtype_of(other, load)).removeprefix("torch.")
    values = {"dtype": dtype, "device": device, "trust_remote_code": load.trust_remote_code}
    return settings_from(LoadSettings, values)
