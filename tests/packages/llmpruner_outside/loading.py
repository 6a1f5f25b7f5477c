"""A family, and a format: a folder with a file ``pointer.txt`` that names the folder of the real model."""

from pathlib import Path
from typing import Any

from llmpruner import CheckpointReader, ModelFamily


class Unknown(ModelFamily):
    name = "unknown"
    summary = "a model type that nothing else understands"
    model_types = ("unknown-type",)


class Pointer(CheckpointReader):
    name = "pointer"
    summary = "a folder that names another"

    def recognises(self, path: Path) -> bool:
        return (path / "pointer.txt").is_file()

    def read_config(self, path: Path) -> Any:
        return self._read("AutoConfig", path)

    def read_model(self, path: Path, dtype: Any) -> Any:
        return self._read("AutoModelForCausalLM", path, dtype=dtype)

    def read_tokenizer(self, path: Path) -> Any:
        return self._read("AutoTokenizer", path)

    def _read(self, name: str, path: Path, **options: Any) -> Any:
        import transformers

        return getattr(transformers, name).from_pretrained((path / "pointer.txt").read_text("utf-8"), **options)
