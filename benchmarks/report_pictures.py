"""Pictures of reports for the documentation: light, dark, on a narrow screen, printed, of several models, and of the
demo.

    python -m benchmarks.report_pictures [--reports FOLDER] [--demo FOLDER]

``--reports``: of ``python -m benchmarks.reports``; ``--demo``: of ``llmpruner demo``. Needs selenium, Chromium with its
driver, and pdftoppm of Poppler.
Writes ``docs/pictures/report-*.png``.
"""

from __future__ import annotations

import argparse
import base64
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
SHOWN = "best-wikitext"
VIEWS = {
    "light": (SHOWN, 1100, 1500, "light"),
    "dark": (SHOWN, 1100, 1500, "dark"),
    "narrow": (SHOWN, 390, 1700, "light"),
    "compared": ("compared", 1100, 920, "light"),
}
"""Picture → page, width, height, colours."""
COLOURS = 64
"""Of a picture: enough for letters on one ground."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reports", type=Path)
    parser.add_argument("--demo", type=Path)
    arguments = parser.parse_args()
    with browser() as driver, tempfile.TemporaryDirectory() as place:
        taken = Path(place) / "taken.png"
        if arguments.demo is not None:
            take(driver, arguments.demo.absolute() / "report.html", "demo", 1100, 1250, "light", taken)
        if arguments.reports is None:
            return
        folder = arguments.reports.absolute()
        for name, (page, width, height, scheme) in VIEWS.items():
            take(driver, folder / f"{page}.html", name, width, height, scheme, taken)
        shown(driver, folder / f"{SHOWN}.html", 1100, 900, "light")
        paper = Path(place) / "page.pdf"
        # A4, in inches.
        size = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": False}
        paper.write_bytes(base64.b64decode(driver.execute_cdp_cmd("Page.printToPDF", size)["data"]))
        subprocess.run(
            ["pdftoppm", "-png", "-r", "96", "-l", "1", "-singlefile", str(paper), str(taken.with_suffix(""))],
            check=True,
        )
        save(taken, "print")


@contextmanager
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    # Named here, as selenium otherwise asks a server for them.
    options.binary_location, driver_file = shutil.which("chromium") or "", shutil.which("chromedriver")
    if not options.binary_location or driver_file is None:
        raise SystemExit("install chromium and chromedriver")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_file))
    try:
        yield driver
    finally:
        driver.quit()


def take(driver: Any, page: Path, name: str, width: int, height: int, scheme: str, taken: Path) -> None:
    shown(driver, page, width, height, scheme)
    taken.write_bytes(base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", {})["data"]))
    save(taken, name)


def shown(driver: Any, page: Path, width: int, height: int, scheme: str) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    driver.get(page.as_uri())


def save(taken: Path, name: str) -> None:
    with Image.open(taken) as picture:
        picture.convert("RGB").quantize(COLOURS).save(PICTURES / f"report-{name}.png", optimize=True)


if __name__ == "__main__":
    main()
