"""The pictures of reports in README and docs, from the pages of ``llmpruner demo`` and ``llmpruner report``.

    python -m benchmarks.report_pictures demo-output/report.html compared.html

Needs Chromium. Writes ``docs/pictures/report-demo.png`` and ``report-compared.png``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
HEIGHTS = {"demo": 1250, "compared": 920}
COLOURS = 64
"""Enough for letters on one ground."""


def main() -> None:
    for page, (name, height) in zip(sys.argv[1:], HEIGHTS.items(), strict=True):
        file = PICTURES / f"report-{name}.png"
        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size=1100,{height}")
        subprocess.run(["chromium", *flags, f"--screenshot={file}", Path(page).absolute().as_uri()], check=True)
        with Image.open(file) as picture:
            picture.convert("RGB").quantize(COLOURS).save(file, optimize=True)


if __name__ == "__main__":
    main()
