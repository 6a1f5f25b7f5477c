"""llmpruner: structural pruning of large language models.

``__init__.pyi`` lists the public names. Each is loaded on first use, so that ``import llmpruner`` imports no torch.
"""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    names = _with_public()
    return names[name] if name in names else names["__getattr__"](name)


def __dir__() -> list[str]:
    found: list[str] = _with_public()["__dir__"]()
    return found


def _with_public() -> dict:
    """The names of this module, with functions that find the public ones in the place of the two above. Reading the
    list waits for the first of them: the command shows a traceback for Ctrl-C until this module is imported."""
    import lazy_loader

    names = globals()
    names["__getattr__"], names["__dir__"], names["__all__"] = lazy_loader.attach_stub(__name__, __file__)
    return names
