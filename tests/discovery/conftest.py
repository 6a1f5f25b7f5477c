from __future__ import annotations

import composed
import pytest


@pytest.fixture(scope="session", autouse=True)
def _known_to_transformers() -> None:
    composed.register()
