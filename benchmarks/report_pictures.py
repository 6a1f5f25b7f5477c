"""The pictures of reports in README and docs, from the pages of ``llmpruner demo`` and ``llmpruner report``.

    python -m benchmarks.report_pictures demo-output/report.html compared.html

Needs Chromium. Writes ``docs/pictures/report-demo.png`` and ``report-compared.png``.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

from PIL import Image

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
COLOURS = 64
"""Enough for letters on one ground."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path)
    parser.add_argument("compared", type=Path)
    options = parser.parse_args()
    take(options.demo, "demo", 1100, 1250)
    take(options.compared, "compared", 1100, 920)


def take(page: Path, name: str, width: int, height: int) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        raise SystemExit("install chromium")
    file = PICTURES / f"report-{name}.png"
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},{height}")
    subprocess.run([browser, *flags, f"--screenshot={file}", page.absolute().as_uri()], check=True)
    with Image.open(file) as picture:
        picture.convert("RGB").quantize(COLOURS).save(file, optimize=True)


if __name__ == "__main__":
    main()
