"""Sending a checkpoint with its model card to the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..errors import CheckpointError, OutputError, SettingsError, first_line
from ..models.record import OF_THIS_MACHINE, RECORD_FILE
from ..report.templates import bare
from .card import CARD_FILE

_PATH = "base_path"
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Upload:
    """What is sent. ``card``: the text of ``README.md``. ``files``: path in the repository → bytes, or the file on this
    machine that holds them. ``url``: of the commit; None while nothing is sent."""

    repo: str
    card: str
    files: Mapping[str, bytes | Path]
    url: str | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Path in the repository → bytes."""
        return {
            name: len(what) if isinstance(what, bytes) else what.stat().st_size for name, what in self.files.items()
        }


def upload_of(directory: Path, repo: str, card: str, record: Mapping[str, Any]) -> Upload:
    """Everything in ``directory`` but hidden files and `OF_THIS_MACHINE`,
    with ``card`` as ``README.md`` and `public_record` of ``record``.

    Raises `CheckpointError` for a directory without weights.
    """
    found: dict[str, bytes | Path] = {
        path.relative_to(directory).as_posix(): path
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        and path.name not in OF_THIS_MACHINE
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    }
    if not any(name.endswith(".safetensors") for name in found):
        raise CheckpointError(f"{directory} holds no safetensors file; push takes what prune, recover or export wrote")
    found[CARD_FILE] = card.encode()
    found[RECORD_FILE] = (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()
    return Upload(repo, card, found)


def public_record(record: Mapping[str, Any], base: str | None) -> dict[str, Any]:
    """``record`` without the folders of this machine: of local paths, names remain; ``base``, the hub id of the dense
    model, takes the place of a path to it."""
    public: dict[str, Any] = _without_folders({key: value for key, value in record.items() if key != _PATH})
    if _PATH in record:
        for plan in public.get("plans") or ():
            plan["base"]["model"] = base or Path(plan["base"]["model"]).name
    return public


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    if isinstance(value, str):
        return bare(value)
    return value


def check_repo(repo: str) -> None:
    """Raises `SettingsError` for what is no name of a repository."""
    try:
        validate_repo_id(repo)
        if "/" not in repo:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise SettingsError(f"'{repo}' is no name of a repository: {first_line(error)}; expected OWNER/NAME") from error


def send(upload: Upload, *, public: bool, api: HfApi | None = None) -> str:
    """Create the repository unless it exists, and commit all files at once; returns the URL of the commit.

    ``public``: of a repository that is created; an existing one stays as it is. Raises `OutputError` in one line.
    """
    api = api or HfApi()
    operations = [
        CommitOperationAdd(name, what if isinstance(what, bytes) else str(what)) for name, what in upload.files.items()
    ]
    try:
        api.whoami()
        api.create_repo(upload.repo, private=not public, exist_ok=True)
        done = api.create_commit(upload.repo, operations, commit_message="Pruned with llmpruner")
    except (OSError, ValueError, HTTPError) as error:
        raise OutputError(f"'{upload.repo}' cannot be written: {_reason(error)}") from error
    return str(done.commit_url)


def _reason(error: Exception) -> str:
    if isinstance(error, LocalTokenNotFoundError):
        return f"there is no token on this machine; {_LOGIN}"
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"the token is not valid, or may not write there; {_LOGIN}"
    return first_line(error)
