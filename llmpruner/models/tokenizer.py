"""The tokenizer of a model, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from ..settings import LoadSettings
from .adapters import adapter_base
from .failures import in_one_line
from .gguf import RECORDED_PRE, pre_tokenizer_of
from .quiet import quiet_transformers
from .reference import Reference, resolve
from .tokenizer_files import TOKENIZER_FILES, damaged_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..plugins.catalog import Catalog
    from .model import Structure


def load_tokenizer(structure: Structure, catalog: Catalog, options: LoadSettings | None = None) -> Any | None:
    """The tokenizer of a model, without its weights; None where it has none."""
    options = options or LoadSettings()
    text = structure.ref
    while (base := adapter_base(Path(text))) is not None:
        text = base
    ref = resolve(text, catalog, revision=options.revision)
    with ref.parsed_once(keep=True):
        return read_tokenizer(ref, options, structure.config)


def brings_tokenizer(text: str, catalog: Catalog) -> bool:
    """Whether a local model has a tokenizer; True for a hub model, as a check would download files."""
    base = adapter_base(Path(text))
    if base is not None:
        return brings_tokenizer(base, catalog)
    ref = resolve(text, catalog)
    if ref.reader is not None:
        return ref.reader.read_tokenizer(ref.directory) is not None
    if ref.gguf_file or not ref.directory.is_dir():
        return True
    return any((ref.directory / name).is_file() for name in TOKENIZER_FILES)


def read_tokenizer(ref: Reference, options: LoadSettings, config: PreTrainedConfig) -> Any | None:
    if ref.reader is not None:
        return ref.reader.read_tokenizer(ref.directory)
    if ref.directory.is_dir() and not ref.gguf_file and not any((ref.directory / f).is_file() for f in TOKENIZER_FILES):
        return None
    # The tokenizer's class is found by the dense configuration; that of a pruned checkpoint needs its remote code.
    extra: dict[str, Any] = ref.gguf_argument or {"config": config}
    with in_one_line(ref, damaged_tokenizer), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(
            ref.location, revision=options.revision, trust_remote_code=options.trust_remote_code, **extra
        )
    pre = pre_tokenizer_of(ref.directory / ref.gguf_file) if ref.gguf_file else None
    if pre is not None:
        # Saved with the tokenizer: transformers does not keep the name, and a GGUF file of the pruned model needs it.
        tokenizer.init_kwargs[RECORDED_PRE] = pre
    return tokenizer
