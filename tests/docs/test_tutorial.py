"""The tutorial can be followed to the letter, quotes its files faithfully, and leaves none out."""

import pytest
from chapters import TUTORIAL, _type, blocks, check_quotes, follow

CHAPTERS = sorted(path.name for path in TUTORIAL.glob("[0-9]*.md"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_can_be_followed(chapter, tmp_path):
    assert follow(chapter, tmp_path) > 4


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_quotes_equal_their_files(chapter):
    assert check_quotes(chapter) >= 3


def test_every_file_of_a_package_that_is_typed_is_quoted():
    """Chapters 1 and 3 are typed by hand from nothing; chapter 2 begins with a copy of its package."""
    for chapter, package in ((CHAPTERS[0], "llmpruner-stablelm"), (CHAPTERS[2], "llmpruner-methods")):
        paths = [p for p in (TUTORIAL / package).rglob("*") if p.suffix in (".py", ".toml") and "build" not in p.parts]
        quoted = {block.path for block in blocks(chapter) if block.quote == "file" and package in str(block.path)}
        assert {path.relative_to(TUTORIAL).as_posix() for path in paths} == quoted


def test_a_false_output_is_noticed(tmp_path):
    with pytest.raises(AssertionError, match="`echo two` shows\ntwo\n\ninstead of\none"):
        _type("echo two", "one\n", "here", tmp_path, {})
    with pytest.raises(AssertionError, match="here: `false` failed"):
        _type("false", "", "here", tmp_path, {})
    _type("echo error: so it is; exit 2", "error: ...\n", "here", tmp_path, {})
