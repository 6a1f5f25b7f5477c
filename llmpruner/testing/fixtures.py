"""Pytest fixtures for plugin authors, to be imported in a test module or ``conftest.py``."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ..plugins.host import PluginHost
from .hosts import host_with


@pytest.fixture
def plugin_host(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PluginHost]:
    """`host_with`, without the environment variables that block or trace plugins."""
    for variable in ("LLMPRUNER_BLOCK", "LLMPRUNER_TRACE"):
        monkeypatch.delenv(variable, raising=False)
    return host_with
