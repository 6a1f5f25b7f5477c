"""The tutorial quotes its files faithfully, leaves none out, and links to what is there."""

from __future__ import annotations

import re

import pytest
from chapters import TUTORIAL, Block, _type, blocks, check_quotes, commands, follow

CHAPTERS = sorted(path.name for path in TUTORIAL.glob("[0-9]*.md"))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_quotes_equal_their_files(chapter):
    assert check_quotes(chapter) >= 3


def test_every_file_of_a_package_that_is_typed_is_quoted():
    """Chapters 1 and 3 are typed by hand from nothing; chapter 2 begins with a copy of its package."""
    for chapter, package in ((CHAPTERS[0], "llmpruner-stablelm"), (CHAPTERS[2], "llmpruner-methods")):
        files = {
            p.relative_to(TUTORIAL).as_posix() for p in (TUTORIAL / package).rglob("*") if p.suffix in (".py", ".toml")
        }
        files = {path for path in files if "/build/" not in path}
        assert files == {
            block.path for block in blocks(chapter) if block.quote == "file" and package in str(block.path)
        }


@pytest.mark.parametrize("page", ["index.md", *CHAPTERS])
def test_links_lead_somewhere(page):
    text = (TUTORIAL / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    assert targets
    for target in targets:
        assert "://" in target or (TUTORIAL / target).exists(), target


def test_every_chapter_is_listed():
    index = (TUTORIAL / "index.md").read_text(encoding="utf-8")
    assert len(CHAPTERS) == 3 and all(f"({chapter})" in index for chapter in CHAPTERS)


def test_a_false_output_is_noticed(tmp_path):
    with pytest.raises(AssertionError, match="`echo two` shows\ntwo\n\ninstead of\none"):
        _type("echo two", "one\n", "here", tmp_path, {})
    with pytest.raises(AssertionError, match="here: `false` failed"):
        _type("false", "", "here", tmp_path, {})
    _type("echo error: so it is; exit 2", "error: ...\n", "here", tmp_path, {})


def test_a_false_quote_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr("chapters.TUTORIAL", tmp_path)
    (tmp_path / "a.py").write_text("one = 1\ntwo = 2\n")
    (tmp_path / "text.md").write_text("<!-- part: a.py -->\n```python\ntwo = 2\n```\n")
    assert check_quotes("text.md") == 1
    (tmp_path / "text.md").write_text("<!-- file: a.py -->\n```python\ntwo = 2\n```\n")
    with pytest.raises(AssertionError, match=r"text.md, line 2: this is not what a.py says"):
        check_quotes("text.md")
    follow("text.md", tmp_path)
    assert (tmp_path / "work" / "a.py").read_text() == "two = 2\n"


def test_commands_and_what_they_show():
    block = Block(1, "console", "$ one\nfirst\n\nthird\n$ two\n$ three\nx\n", None, None)
    assert commands(block) == [("one", "first\n\nthird\n"), ("two", ""), ("three", "x\n")]
