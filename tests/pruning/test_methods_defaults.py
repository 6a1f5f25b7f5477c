"""Methods are settings for a prune: valid ones, that name what exists, for what the user asked."""

import pytest

from llmpruner import Method
from llmpruner.pruning.job import prune_job
from llmpruner.pruning.methods import Best, Fast, LlmPruner
from llmpruner.settings import PruneSettings
from llmpruner.testing import catalog_with

MLP, LAYERS = PruneSettings(ratio=0.2), PruneSettings(ratio=0.2, kinds="layer")


def test_best_writes_fewer_samples_than_it_reads():
    amounts = [Best().defaults(MLP, writes=writes) for writes in (True, False)]
    assert [(found["samples"], found["length"]) for found in amounts] == [(96, 512), (128, 512)]


@pytest.mark.parametrize(("method", "criterion"), [(Best, "fisher"), (Fast, "energy")])
def test_the_criterion_depends_on_what_is_removed(method, criterion):
    experts = PruneSettings(ratio=0.2, kinds=["expert"])
    found = [method().defaults(asked, writes=True)["importance"] for asked in (MLP, LAYERS, experts)]
    assert found == [criterion, "angular", "energy"]


def test_the_papers_variant_belongs_to_the_papers_criterion():
    assert LlmPruner().defaults(MLP, writes=True)["settings"] == {"taylor": {"variant": "element1"}}
    assert "settings" not in LlmPruner().defaults(PruneSettings(ratio=0.2, importance="l2"), writes=True)


@pytest.fixture
def job():
    """``job(defaults, …)``: what a prune does by a method of a plugin with these defaults, and what the user gives."""

    def job(defaults, **asked):
        class Mine(Method):
            name = "mine"
            summary = "a method of a plugin"

            def defaults(self, asked, *, writes):
                return defaults

        return prune_job(PruneSettings(ratio=0.2, method="mine", **asked), catalog_with(Mine, entry_points=True))

    return job


def test_every_setting_of_a_method_is_used_unless_the_user_gives_it(job):
    mine = {"importance": "l1", "kinds": "mlp,attention", "allocation": "global", "steps": 3,
            "settings": {"global": {"normalize": "mean"}},
            "shape": "free", "layers": "all", "round_to": 4, "budget": "bytes", "seed": 7}  # fmt: skip
    found = job(mine, steps=2)
    assert (found.criterion.name, found.allocation.name) == ("l1", "global")
    assert found.allocation.settings.normalize == "mean"
    assert (found.kinds, found.steps, found.shape, found.round_to) == (("mlp", "attention"), 2, "free", 4)
    assert (found.budget.name, found.seed, found.layers) == ("bytes", 7, "all")


def test_the_text_that_a_method_names_is_read(job, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps. " * 40)
    found = job({"importance": "energy", "calibration": str(tmp_path / "text.txt")})
    assert found.calibration.text == str(tmp_path / "text.txt")


def test_what_a_method_leaves_open_is_as_without_one(job):
    found = job({"importance": "taylor"})
    assert (found.compensation.name, found.calibration.samples, found.calibration.length) == ("none", 10, 64)
    assert job({}, importance="l2").criterion.name == "l2"
