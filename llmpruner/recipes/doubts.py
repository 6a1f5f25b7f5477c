"""What identifies a model to an allocation that was measured, and what is doubtful about its use."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..models.identity import model_identity
from ..models.model import Model
from ..pruning.allocation.base import Allocation, AllocationUse
from ..structure.plan import structure_of

if TYPE_CHECKING:
    from ..engine.ranks import Ranks
    from ..models.model import Structure
    from ..plugins.catalog import Catalog
    from .jobs import PruneJob

_LOG = logging.getLogger("llmpruner")


def use_of(job: PruneJob, opened: Structure, catalog: Catalog) -> AllocationUse:
    """What the allocation of ``job`` is used with. A model in memory may differ from its files."""
    in_memory = isinstance(opened, Model)
    files = None if in_memory else model_identity(opened, catalog)
    return AllocationUse(
        opened.ref, structure_of(opened.graph), files, job.criterion.name, job.compensation.name
    )  # fmt: skip


def warn_of_allocation(job: PruneJob, opened: Structure, catalog: Catalog, ranks: Ranks) -> None:
    """Show the doubts of the allocation of ``job``, in the first of several processes."""
    if ranks.first and type(job.allocation).doubts is not Allocation.doubts:
        for line in job.allocation.doubts(use_of(job, opened, catalog)):
            _LOG.warning(line)
