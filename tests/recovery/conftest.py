import pytest
from recovery_cases import train_tiny


@pytest.fixture
def tiny(tmp_path):
    """``tiny(strategy, **changes)``: the result of `train_tiny` in the folder ``name``."""

    def run(strategy, *arguments, name="run", **changes):
        return train_tiny(tmp_path / name, strategy, *arguments, **changes)

    return run
