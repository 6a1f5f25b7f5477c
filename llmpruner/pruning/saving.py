"""Writing a model in the form that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..discovery.dense import base_record
from ..errors import ModelError
from ..models.config import stated
from ..models.record import read_any_record
from ..models.save import save_checkpoint, vocabulary_files

if TYPE_CHECKING:
    from ..models.model import Model


def save(model: Model, directory: Path) -> str:
    """Write an ordinary Hugging Face directory; returns ``stock`` or ``shim`` (see `save_checkpoint`). Raises as
    `check_fits`."""
    check_fits(model)
    record = {
        **_own_record(model),
        **base_record(model),
        "llmpruner": __version__,
        "plans": [plan.model_dump(mode="json") for plan in model.plans],
        "work": _all_work(model),
        "base_config": stated(model.config),
    }
    return save_checkpoint(
        model.model,
        directory,
        record=record,
        tokenizer=model.tokenizer,
        family=model.family,
        extra_files=vocabulary_files(model.tokenizer),
        parts=model.streamed,
    )


def check_fits(model: Model) -> None:
    """Raise `ModelError` for a model that is half-changed, or whose parameters are not those of its plans: something
    else than `llmpruner.prune` cut it, and what is saved could not be loaded."""
    model.check_whole()
    for name, parameter in model.model.named_parameters(remove_duplicate=False):
        expected, found = model.graph.shapes.get(name), tuple(parameter.shape)
        if found != expected:
            raise ModelError(
                f"parameter '{name}' of '{model.ref}' has shape {found}, and by the model's "
                f"{len(model.plans)} plans {expected}; save what llmpruner.prune returned, or load the model again"
            )


def _own_record(model: Model) -> dict[str, Any]:
    """What the record of ``model`` takes over. At the first cut, trainings and adapters that are in the files of the
    model are of the dense one, and restored nothing that was cut."""
    record = dict(model.record or {})
    if not model.plans or record.get("plans"):
        return record
    record.pop("adapters", None)
    before = None if model.path is None else read_any_record(model.path)
    since = record.pop("recovery", [])[len((before or {}).get("recovery") or ()) :]
    return {**record, "recovery": since} if since else record


def _all_work(model: Model) -> list[Mapping[str, Any] | None]:
    """One for each plan; None for cuts of a version that did not record it."""
    earlier = list((model.record or {}).get("work") or ())
    missing = len(model.plans) - len(earlier) - len(model.work)
    return [*earlier, *[None] * missing, *model.work]
