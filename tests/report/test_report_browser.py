"""The page in a browser: headless Chromium, driven by selenium, and axe-core for its accessibility.

``LLMPRUNER_AXE``: path of ``axe.min.js`` from the npm package axe-core. Skipped where one of the three is missing.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tiny_report import build, page_of

BROWSER, DRIVER, AXE = shutil.which("chromium"), shutil.which("chromedriver"), os.environ.get("LLMPRUNER_AXE", "")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not BROWSER, reason="chromium is not installed"),
    pytest.mark.skipif(not DRIVER, reason="chromedriver is not installed"),
    pytest.mark.skipif(not Path(AXE).is_file(), reason="LLMPRUNER_AXE does not name axe.min.js of axe-core"),
]
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
WIDE, NARROW = 1100, 380
NAMES = ("one", "several")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Name → page of one tiny checkpoint, and of three."""
    places, pages = build(tmp_path_factory.mktemp("places")), {}
    for name, names in (("one", ("small",)), ("several", ("small", "smaller", "worse"))):
        folder = tmp_path_factory.mktemp(name)
        page_of(places, folder, *names)
        pages[name] = folder / "page.html"
    return pages


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    service = webdriver.chrome.service.Service(DRIVER)
    chrome = webdriver.Chrome(options=options, service=service)
    yield chrome
    chrome.quit()


def opened(browser, page: Path, *, width: int = WIDE, scheme: str = "light"):
    """``browser`` at the page, once all is loaded."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())
    return browser


@pytest.mark.parametrize("name", NAMES)
def test_on_a_narrow_screen_tables_and_drawings_scroll_and_the_page_does_not(browser, pages, name):
    opened(browser, pages[name], width=NARROW)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= NARROW
    wide = browser.execute_script(
        "const lost = one => one.scrollWidth > one.clientWidth && one.tabIndex < 0;"
        "return [...document.querySelectorAll('.scroll')].filter(lost).length"
    )
    assert wide == 0, "what scrolls can be reached by keyboard"
    scales = browser.execute_script(
        "const scale = one => one.getBoundingClientRect().width / one.viewBox.baseVal.width;"
        "return [...document.querySelectorAll('svg.chart')].filter(one => one.checkVisibility()).map(scale)"
    )
    assert min(scales) > 0.7, "letters of drawings can be read"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("name", NAMES)
def test_axe_finds_no_serious_fault(browser, pages, name, width, scheme):
    opened(browser, pages[name], width=width, scheme=scheme)
    browser.execute_script("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    browser.execute_script(Path(AXE).read_text(encoding="utf-8"))
    found = browser.execute_async_script("axe.run().then(arguments[arguments.length - 1])")
    assert found["passes"]
    assert [
        (one["id"], one["nodes"][0]["html"]) for one in found["violations"] if one["impact"] in ("serious", "critical")
    ] == []
