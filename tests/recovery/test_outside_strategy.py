"""A strategy of an outside package, with a loss of its own and the dense model as a teacher."""

import sys
from pathlib import Path

import pytest
from recovery_cases import dense_model

from llmpruner import SettingsError
from llmpruner.testing import RecoveryConformance, catalog_with

PACKAGE = Path(__file__).parents[1] / "packages" / "llmpruner-distil"


@pytest.fixture(scope="module")
def distil():
    sys.path.insert(0, str(PACKAGE))
    import llmpruner_distil

    yield llmpruner_distil
    sys.path.remove(str(PACKAGE))
    sys.modules.pop("llmpruner_distil")


@pytest.mark.parametrize(
    "check",
    [name for name in vars(RecoveryConformance) if name.startswith("test_") and "entry_point" not in name],
)
def test_it_conforms(distil, check, tmp_path):
    case = type("Case", (RecoveryConformance,), {"strategy": distil.Distil})()
    method = getattr(case, check)
    method(tmp_path) if method.__code__.co_argcount > 1 else method()


def test_it_trains_toward_the_dense_model_and_is_recorded(distil, tiny):
    record = tiny(distil.Distil(temperature=1.0), max_steps=20, learning_rate=1e-3).details
    assert record["strategy"] == "imitation" and record["strategy_settings"] == {"temperature": 1.0}
    assert record["best_step"] > 0


def test_the_teacher_is_loaded_once_and_only_on_request(tiny):
    from llmpruner.recovery.strategies import DistilStrategy, FullStrategy

    loads = []

    def load():
        loads.append(1)
        return dense_model()

    tiny(FullStrategy(), name="full", max_steps=1, load_teacher=load)
    assert loads == []
    tiny(DistilStrategy(), name="distil", max_steps=3, load_teacher=load)
    assert loads == [1]


def test_settings_are_checked(distil):
    catalog = catalog_with(distil)
    with pytest.raises(SettingsError, match="strategy imitation: temperature 0: input should be greater than 0"):
        catalog.strategies["imitation"](temperature=0)
    with pytest.raises(SettingsError, match=r"recovery strategy full: unknown setting 'rank'\. Known: none"):
        catalog.strategies["full"](rank=4)
