"""A plugin package on disk: templates filled in, written aside, renamed."""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from .. import __version__
from ..errors import LlmprunerError, OutputError
from .model import ModelFacts

FILES = {
    "pyproject.toml": "pyproject.toml.j2",
    "README.md": "README.md.j2",
    ".gitignore": "gitignore.j2",
    ".github/workflows/test.yml": "test.yml.j2",
    "src/{module}/__init__.py": "init.py.j2",
    "src/{module}/family.py": "family.py.j2",
    "tests/test_family.py": "test_family.py.j2",
}
"""Path in the package → template."""

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
PREFIX = "llmpruner-"


@dataclass(frozen=True, slots=True)
class PluginName:
    """The one word that all names of a plugin come from."""

    word: str

    def __post_init__(self) -> None:
        if self.word.startswith(PREFIX):
            short = self.word.removeprefix(PREFIX)
            raise LlmprunerError(f"'{self.word}': leave '{PREFIX}' out, it is put before the name; write '{short}'")
        if not _NAME.fullmatch(self.word):
            raise LlmprunerError(
                f"'{self.word}' cannot name a plugin; expected lower case letters, digits and single dashes, "
                "a letter first, as in 'my-model'"
            )

    @property
    def distribution(self) -> str:
        return PREFIX + self.word

    @property
    def module(self) -> str:
        return self.distribution.replace("-", "_")

    @property
    def family(self) -> str:
        return "".join(part.capitalize() for part in self.word.split("-")) + "Family"


def render(name: PluginName, model: ModelFacts) -> dict[str, str]:
    """Path in the package → text. The same name and model give the same bytes."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    folder = resources.files("llmpruner.scaffold") / "templates"
    values = {"name": name, "model": model, "version": __version__}
    return {
        path.format(module=name.module): environment.from_string(
            (folder / template).read_text(encoding="utf-8")
        ).render(values)
        for path, template in FILES.items()
    }


def write(directory: Path, files: dict[str, str]) -> None:
    """Write ``files`` beside ``directory``, then rename: the package is whole or not there. Raises `OutputError`."""
    parent = directory.resolve().parent
    aside = None
    try:
        aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=parent))
        for path, text in files.items():
            file = aside / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        aside.chmod(0o755)
        aside.rename(directory)
    except OSError as error:
        raise OutputError(f"cannot write {directory}: {error.strerror or error}") from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
