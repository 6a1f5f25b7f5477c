"""The strategy of a recovery where the user names none."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..discovery.dense import dense_structure
from ..engine.memory import size_text
from ..errors import LlmprunerError
from .training_memory import memory_of_device, training_forecast

if TYPE_CHECKING:
    from ..models.model import Structure
    from ..plugins.catalog import Catalog
    from ..settings import LoadSettings
    from .jobs import RecoverJob


def with_strategy(
    job: RecoverJob, opened: Structure, load: LoadSettings, catalog: Catalog
) -> tuple[RecoverJob, str | None]:
    """``job`` with the strategy that is used, and a line that says why. Where the user named none, that is the job's,
    which needs the dense model, if that can be opened and the device has the memory for both; else
    `RecoverJob.instead`.

    How much memory is free plays no part, so that the same command always trains alike on one machine.
    """
    if job.instead is None:
        return job, None
    chosen, other = replace(job, instead=None), replace(job, strategy=job.instead, instead=None)
    first, second = job.strategy.name, job.instead.name
    try:
        dense = dense_structure(opened, catalog, trust_remote_code=load.trust_remote_code)
    except LlmprunerError as error:
        return other, f"strategy {second}, as {first} needs the dense model: {error}"
    needed, has = training_forecast(job, opened, dense, load, catalog).memory, memory_of_device(opened, load)
    if needed > has:
        return other, (
            f"strategy {second}, as {first} needs about {size_text(needed)} of memory, and there are {size_text(has)}"
        )
    return chosen, f"strategy {first}, toward the predictions of {dense.ref} (--strategy {second} is the paper's)"
