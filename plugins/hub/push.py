"""Collecting the files of a checkpoint, and sending them to the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

import llmpruner
from llmpruner import Catalog, CheckpointError, ModelError, OutputError, SettingsError

from .card import CARD_FILE, base_of, model_card

_RECORD = "llmpruner.json"
_STAYS = ("run.json", "report.html", "step.json")
"""Files about the machine that the checkpoint was made on: they have paths of it."""


@dataclass(frozen=True)
class Upload:
    """What is sent. ``card``: the text of ``README.md``. ``files``: path in the repository → bytes, or the file on this
    machine that holds them."""

    repo: str
    card: str
    files: Mapping[str, bytes | Path]


def prepare(
    directory: Path,
    repo: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    evaluation: Path | None = None,
    catalog: Catalog | None = None,
) -> Upload:
    """The files of a checkpoint with its model card, unless there is a ``README.md`` already.

    ``evaluation``: what ``evaluate --json`` wrote. Raises `ModelError` for what is no pruned checkpoint of
    transformers, `SettingsError` for a wrong name of a repository, or what a card that is there would not show, and
    `DataError` for a wrong ``evaluation``.
    """
    _check_repo(repo)
    if not (directory / "config.json").is_file() or not (directory / _RECORD).is_file():
        raise ModelError(
            f"'{directory}' is no pruned checkpoint with config.json and {_RECORD}; push takes what prune and recover "
            "wrote, with adapters merged"
        )
    structure = llmpruner.discover(directory, catalog=catalog)
    record = dict(structure.record or {})
    base = base_model or base_of(record)
    record = public_record(record, base)
    if (directory / CARD_FILE).is_file():
        if license is not None or evaluation is not None:
            raise SettingsError(
                f"'{directory}' has a {CARD_FILE}, which --license and --evaluation do not change; edit or move it"
            )
        card = (directory / CARD_FILE).read_text(encoding="utf-8")
    else:
        figures = None if evaluation is None else llmpruner.read_evaluations(evaluation, catalog or Catalog())
        card = model_card(structure, repo, record, base=base, license=license, evaluations=figures)
    files: dict[str, bytes | Path] = {
        path.relative_to(directory).as_posix(): path
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        and path.name not in _STAYS
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    }
    if not any(name.endswith(".safetensors") for name in files):
        raise CheckpointError(f"{directory} has no safetensors file; push takes what prune and recover wrote")
    files[CARD_FILE] = card.encode()
    files[_RECORD] = (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()
    return Upload(repo, card, files)


def public_record(record: Mapping[str, Any], base: str | None) -> dict[str, Any]:
    """``record`` without the folders of this machine: of local paths, names remain; ``base``, the hub id of the dense
    model, takes the place of a path to it."""
    public: dict[str, Any] = _without_folders({key: value for key, value in record.items() if key != "base_path"})
    if "base_path" in record:
        for plan in public.get("plans") or ():
            plan["base"]["model"] = base or Path(plan["base"]["model"]).name
    return public


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    return llmpruner.without_folders(value) if isinstance(value, str) else value


def _check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
        if "/" not in repo:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"'{repo}' is no name of a repository: {reason}; expected OWNER/NAME") from error


def send(upload: Upload, *, public: bool = False) -> str:
    """Create the repository unless it exists, and commit all files at once; returns the URL of the commit.

    ``public``: of a repository that is created; an existing one stays as it is. Raises `OutputError` in one line.
    """
    api = HfApi()
    operations = [CommitOperationAdd(name, f if isinstance(f, bytes) else str(f)) for name, f in upload.files.items()]
    try:
        api.whoami()
        api.create_repo(upload.repo, private=not public, exist_ok=True)
        done = api.create_commit(upload.repo, operations, commit_message="Pruned with llmpruner")
    except (OSError, ValueError, HTTPError) as error:
        raise OutputError(f"'{upload.repo}' cannot be written: {_reason(error)}") from error
    return str(done.commit_url)


def _reason(error: Exception) -> str:
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, LocalTokenNotFoundError):
        return f"there is no token on this machine; {login}"
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"the token is not valid, or may not write there; {login}"
    return str(error).splitlines()[0]
