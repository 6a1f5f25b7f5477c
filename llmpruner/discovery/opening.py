"""Opening what users name: references, structures, and models in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import SettingsError, no_tokenizer
from ..models.model import Model, Structure
from ..models.numbers import check_device, widened
from ..models.opening import load_model, open_streamed
from ..models.tokenizer import brings_tokenizer, load_tokenizer
from ..progress import QUIET, Progress
from ..settings import LoadSettings
from .family import AUTO
from .structure import load_structure

if TYPE_CHECKING:
    from ..engine.ranks import Ranks
    from ..plugins.catalog import Catalog

Source = str | Path | Structure
"""A reference to a model, its structure (`discover`), or the model with its weights (`load`)."""


@dataclass(frozen=True)
class Opener:
    """Opens models with the plugins of ``catalog`` and the settings of ``load``."""

    catalog: Catalog
    load: LoadSettings
    progress: Progress

    def of_ranks(self, ranks: Ranks) -> Opener:
        """For a command that several processes share, of which the first one alone prints messages."""
        return self if ranks.first else replace(self, progress=QUIET)

    def structure(self, source: Source) -> Structure:
        """The structure of a reference; a structure as it is. Reads no weights. Raises `ModelError` for a model in
        memory that a stage left half-changed, `SettingsError` for what is none of the three."""
        check_source(source)
        if isinstance(source, Structure):
            return source
        found = load_structure(str(source), self.catalog, self.load)
        if found.family.name == AUTO and self.load.family is None and not found.plans:
            self.progress.status(f"structure of this {found.config.model_type} model discovered by tracing")
        return found

    def model(self, source: Source, *, keep_dtype: bool = False) -> Model:
        """A model with its weights in memory; a model as it is. ``keep_dtype``: weights in float16 stay so on a CPU,
        where no other dtype was asked for."""
        opened, opener = self.structure(source), self
        if keep_dtype and widened(opened, self.load) is not None:
            opener = replace(self, load=self.load.model_copy(update={"dtype": "float16"}))
        return opener.weights(opened)

    def weights(self, opened: Structure, *, streamed: bool = False, scratch: Path | None = None) -> Model:
        """``opened`` with its weights, in memory or, ``streamed``, read layer by layer; a model as it is. ``scratch``:
        see `open_streamed`."""
        if isinstance(opened, Model):
            return opened
        check_device(self.load.device)
        if streamed:
            self.progress.status(f"{opened.ref} is read layer by layer")
            return open_streamed(opened, self.catalog, self.load, scratch)
        self.progress.status(f"loading {opened.ref}")
        return load_model(opened, self.catalog, self.load)

    def say_widened(self, opened: Structure) -> None:
        """Say where a result will be saved in a wider dtype than the model is stored in."""
        line = None if isinstance(opened, Model) else widened(opened, self.load)
        if line is not None:
            self.progress.status(line)

    def tokenizer(self, opened: Structure) -> Any | None:
        """The tokenizer of a model, without its weights; None where it has none."""
        if isinstance(opened, Model):
            return opened.tokenizer
        return load_tokenizer(opened, self.catalog, self.load)

    def has_tokenizer(self, opened: Structure) -> bool:
        """Whether a model has a tokenizer, or its folder the files of one."""
        return opened.tokenizer is not None if isinstance(opened, Model) else brings_tokenizer(opened.ref, self.catalog)

    def readable(self, source: Source, purpose: str) -> Structure:
        """`structure`. Raises `ModelError` for a model without a tokenizer, which cannot ``purpose``."""
        found = self.structure(source)
        if not self.has_tokenizer(found):
            raise no_tokenizer(f"model '{found.ref}'", f"it cannot {purpose}")
        return found


def listed(models: Source | Sequence[Source]) -> list[Source]:
    """One model or several, as a list. Raises `SettingsError` for none, and as `check_source`."""
    several = isinstance(models, Iterable) and not isinstance(models, (str, Path, Structure, nn.Module))
    sources: list[Source] = list(models) if several else [models]  # type: ignore[arg-type, list-item]
    if not sources:
        raise SettingsError("no model is named; name at least one")
    for source in sources:
        check_source(source)
    return sources


def check_source(source: object) -> None:
    """Raise `SettingsError` for another object than a reference, a structure or a model, and `ModelError` for a model
    that a stage left half-changed."""
    if not isinstance(source, (str, Path, Structure)):
        raise SettingsError(
            f"expected a path, a hub id or what llmpruner.load returned as a model, got {type(source).__name__}"
        )
    if isinstance(source, Model):
        source.check_whole()
