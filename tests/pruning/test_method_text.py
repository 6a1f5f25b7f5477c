"""A method may name the calibration text, which is then part of what a run depends on."""

from __future__ import annotations

from llmpruner import Catalog
from llmpruner.models.identity import data_identity
from llmpruner.pruning.job import prune_job
from llmpruner.pruning.methods import Fast
from llmpruner.settings import PruneSettings


def test_the_text_that_a_method_names_is_read_and_known_by_its_content(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps. " * 40)

    class OfPlugin(Fast):
        name = "of-plugin"

        def defaults(self, asked, *, writes):
            return {**super().defaults(asked, writes=writes), "calibration": str(text)}

    catalog, create = Catalog(), Catalog.create
    monkeypatch.setattr(
        Catalog,
        "create",
        lambda self, registry, *args: OfPlugin() if registry is self.methods else create(self, registry, *args),
    )
    job = prune_job(PruneSettings(ratio=0.2), catalog)
    assert job.calibration is not None and job.calibration.text.text == str(text)
    before = data_identity(job)
    text.write_text("The brown quick fox jumps. " * 40)
    assert before.keys() == {str(text)} and data_identity(job) != before
