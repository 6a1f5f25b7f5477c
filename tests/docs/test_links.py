"""Links lead somewhere, commands in the text can be typed, and the site builds without a warning."""

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer.main

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *DOCS.glob("[!_]*/*.md")])
FENCE = re.compile(r"^(```+).*?^\1`*$", re.S | re.M)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+?)\s*$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", title) for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.name)
def test_links_of_pages_outside_of_the_site_resolve(page):
    """The site is built with its links checked."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target, anchor in re.findall(r"\]\(([^()\s#]*)#?([^()\s]*)\)", text):
        if "://" not in target:
            path = ROOT / target if target else page
            assert path.exists(), f"{page.name} links to {target}, which does not exist"
            assert not anchor or anchor in anchors(path), f"{target} has no heading #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_by_a_name_are_defined(page):
    text = re.sub(r"`[^`\n]+`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    assert set(re.findall(r"\]\[([^\]\n]+)\]", text)) <= set(re.findall(r"^\[([^\]]+)\]: \S+$", text, re.M))


def typed(page: Path) -> list[list[str]]:
    """The commands of llmpruner in fenced blocks; those with … are left out."""
    blocks = [found[0] for found in FENCE.finditer(page.read_text(encoding="utf-8"))]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    told = [line.removeprefix("$ ") for line in lines if re.match(r"(\$ )?llmpruner [a-z]", line)]
    told = [re.split(r" [|>] | \d?>", line)[0] for line in told if "[OPTIONS]" not in line and "…" not in line]
    return [shlex.split(line, comments=True)[1:] for line in told]


def test_commands_in_the_text_can_be_typed():
    from llmpruner.cli.app import build_app
    from llmpruner.plugins.manager import PluginManager

    group = typer.main.get_command(build_app(PluginManager()))
    count = 0
    for page in PAGES:
        for name, *rest in typed(page):
            where = f"{page.relative_to(ROOT)}: llmpruner {' '.join([name, *rest])}"
            assert name in group.commands, f"{where}: no such command"
            try:
                group.commands[name].make_context(name, list(rest))
            except Exception as error:
                if "does not exist" not in str(error):  # files of examples
                    pytest.fail(f"{where}: {getattr(error, 'message', '') or error}")
            count += 1
    assert count > 20


@pytest.mark.skipif(find_spec("material") is None, reason="mkdocs-material is not installed (extra: docs)")
def test_the_site_builds_without_a_warning(tmp_path):
    # Not --quiet: it silences warnings before --strict can count them.
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "reference" / "hooks" / "index.html").is_file()
