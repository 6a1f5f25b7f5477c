"""The exception tree, as its module draws it."""

from __future__ import annotations

import inspect

import pytest

from llmpruner import errors
from llmpruner.errors import LlmprunerError, MissingExtraError, UnknownNameError


def drawn() -> dict[str, str]:
    """Class → base, read from the drawing: four columns further right is one level down."""
    tree: dict[str, str] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        name = line.lstrip("│├└─ ").split(" ")[0]
        if not name.endswith("Error"):
            continue
        depth = line.index(name) // 4
        above[depth:] = [name]
        tree[name] = above[depth - 1] if depth else "Exception"
    return tree


def test_the_drawing_shows_exactly_the_classes_of_the_module():
    classes = {
        name: cls.__base__.__name__ for name, cls in vars(errors).items() if inspect.isclass(cls) and is_own(cls)
    }
    assert drawn() == classes
    assert len(classes) > 10


def is_own(cls: type) -> bool:
    return cls.__module__ == errors.__name__


@pytest.mark.parametrize("name", sorted(drawn()))
def test_each_is_documented_and_handled_by_the_command_line(name):
    cls = getattr(errors, name)
    assert issubclass(cls, LlmprunerError)
    assert (cls.__doc__ and cls.__doc__ != LlmprunerError.__doc__) or cls is LlmprunerError


def test_an_unknown_name_offers_near_misses_and_lists_all():
    error = UnknownNameError("criterion", "tailor", ["l1", "taylor", "random"])
    assert str(error) == "unknown criterion 'tailor'; did you mean taylor? Known: l1, random, taylor."
    assert str(UnknownNameError("kind", "x", [])) == "unknown kind 'x'. Known: none."


def test_the_message_on_a_missing_extra_names_the_command():
    assert str(MissingExtraError("peft", "recover")) == "peft is not installed; run: pip install 'llmpruner[recover]'"
