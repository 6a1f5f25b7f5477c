"""From a checkpoint to what is published of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..discovery.graph import build_graph
from ..errors import DataError, ModelError, SettingsError
from ..models.adapters import adapter_base
from ..models.record import RECORD_FILE, read_any_record, read_json
from ..publishing.card import CARD_FILE, CardFacts, base_of, licence_of, model_card, named_licence
from ..publishing.push import Upload, check_repo, public_record, upload_of
from ..settings import PushSettings, flag_of
from .evidence import is_evaluation, json_value

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..models.model import Structure


def prepare_upload(directory: Path, repo: str, job: PushSettings, find: Callable[[], Structure]) -> Upload:
    """The files of a checkpoint with its model card. A ``README.md`` that is there already is kept as it is. ``find``:
    opens the structure of the checkpoint.

    Raises `ModelError` for what is no checkpoint of llmpruner, and `SettingsError` for settings without effect.
    """
    check_repo(repo)
    if adapter_base(directory) is not None:
        raise ModelError(
            f"'{directory}' has adapters alone, which push does not take; merge them first, in Python with "
            f"llmpruner.save(llmpruner.load('{directory}'), 'OUTPUT'), or recover without --no-merge"
        )
    form = _other_format(directory)
    if form is not None:
        raise ModelError(
            f"'{directory}' holds {form}, for which push writes no card; push the checkpoint that it was exported "
            f"from, or send this one as it is: hf upload {repo} '{directory}'"
        )
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"'{directory}' is no checkpoint directory; push takes what prune and recover wrote, and export --to stock "
            "or torchao"
        )
    if not (directory / RECORD_FILE).is_file():
        raise ModelError(f"'{directory}' has no {RECORD_FILE}, so it was not pruned by llmpruner")
    record = read_json(directory / RECORD_FILE)
    base = job.base_model or base_of(record)
    public = public_record(record, base)
    card = directory / CARD_FILE
    if card.is_file():
        for name in ("license", "base_model", "evaluation"):
            if getattr(job, name) is not None:
                flag = flag_of(PushSettings, name)
                raise SettingsError(f"{flag} has no effect on {card}, which is sent as it is; edit it, or remove it")
        return upload_of(directory, repo, card.read_text(encoding="utf-8"), public)
    return upload_of(directory, repo, model_card(public, _facts(directory, repo, job, base, record, find())), public)


def _other_format(directory: Path) -> str | None:
    """What an export wrote that is no checkpoint of transformers; None for anything else."""
    form = (read_any_record(directory) or {}).get("format")
    if form is not None:
        return f"the format {form}"
    if (directory / "config.json").is_file():
        return None
    files = sorted(file.name for pattern in ("*.gguf", "consolidated.*.pth") for file in directory.glob(pattern))
    return ", ".join(files) or None


def _facts(
    directory: Path, repo: str, job: PushSettings, base: str | None, record: dict[str, Any], structure: Structure
) -> CardFacts:
    dense, graph = build_graph(structure.family, structure.config), structure.graph
    config = read_json(directory / "config.json")
    given = None if job.license is None else named_licence(job.license)
    return CardFacts(
        repo=repo,
        base=base,
        licence=given or licence_of(base, record.get("base_path")),
        decoder=(dense.decoder_parameters, graph.decoder_parameters),
        parameters=(dense.total_parameters, graph.total_parameters),
        form="shim" if "llmpruner" in config else "stock",
        quantised=(config.get("quantization_config") or {}).get("quant_method"),
        evaluations=() if job.evaluation is None else _evaluations(job.evaluation),
    )


def _evaluations(file: Path) -> list[dict[str, Any]]:
    """What ``evaluate --json`` wrote. Raises `DataError`."""
    written = "what `llmpruner evaluate --json` wrote"
    found: list[dict[str, Any]] = json_value(file, written)
    if not is_evaluation(found):
        raise DataError(f"{file} is not {written}")
    return found
