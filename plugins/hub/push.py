"""What is sent to the Hugging Face Hub: the files of a checkpoint, and its model card, written from its record."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from jinja2 import Environment, PackageLoader, StrictUndefined

import llmpruner
from llmpruner import CheckpointError, ModelError, OutputError, PruningPlan, SettingsError, Structure

CARD_FILE = "README.md"
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_RECORD = "llmpruner.json"
_STAYS = ("run.json", "report.html")
"""Files about the machine that the checkpoint was made on: they have paths of it."""


def prepare(
    directory: Path,
    repo: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    evaluation: Path | None = None,
    trust_remote_code: bool = False,
    catalog: llmpruner.Catalog | None = None,
) -> dict[str, bytes | Path]:
    """What is sent: path in the repository → bytes, or the file on this machine that holds them. ``README.md`` is the
    model card, unless there is one already.

    ``evaluation``: what ``evaluate --json`` wrote. Raises `ModelError` for what is no pruned checkpoint of
    transformers, `SettingsError` for a wrong name of a repository, or what a card that is there would not show, and
    `DataError` for a wrong ``evaluation``.
    """
    if not _HUB_ID.fullmatch(repo):
        raise SettingsError(f"'{repo}' is no name of a repository; expected OWNER/NAME")
    if not (directory / "config.json").is_file() or not (directory / _RECORD).is_file():
        raise ModelError(
            f"'{directory}' is no pruned checkpoint with config.json and {_RECORD}; push takes what prune and recover "
            "wrote, with adapters merged"
        )
    structure = llmpruner.discover(directory, trust_remote_code=trust_remote_code, catalog=catalog)
    record = structure.record or {}
    if not structure.plans:
        raise CheckpointError(f"{_RECORD} in {directory} has no plan, so there is nothing to write a card from")
    dense = structure.plans[0].base.model
    is_on_hub = "base_path" not in record and _HUB_ID.fullmatch(dense)
    base = base_model or (dense if is_on_hub else None)
    public = public_record(record, base)
    if (directory / CARD_FILE).is_file():
        if license is not None or evaluation is not None:
            raise SettingsError(
                f"'{directory}' has a {CARD_FILE}, which --license and --evaluation do not change; edit or move it"
            )
        card = (directory / CARD_FILE).read_bytes()
    else:
        figures = (
            None if evaluation is None else llmpruner.read_evaluations(evaluation, catalog or llmpruner.load_catalog())
        )
        card = model_card(structure, repo, public, base=base, license=license, evaluations=figures).encode()
    files: dict[str, bytes | Path] = {
        path.relative_to(directory).as_posix(): path
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        and path.name not in _STAYS
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    }
    files[CARD_FILE] = card
    files[_RECORD] = (json.dumps(public, indent=1, ensure_ascii=False) + "\n").encode()
    return files


def public_record(record: Mapping[str, Any], base: str | None) -> dict[str, Any]:
    """``record`` without the folders of this machine: of local paths, names remain; ``base``, the hub id of the dense
    model, takes the place of a path to it."""
    public: dict[str, Any] = _without_folders({key: value for key, value in record.items() if key != "base_path"})
    if "base_path" in record:
        for plan in public["plans"]:
            plan["base"]["model"] = base or Path(plan["base"]["model"]).name
    return public


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    return llmpruner.without_folders(value) if isinstance(value, str) else value


def model_card(
    structure: Structure,
    repo: str,
    record: Mapping[str, Any],
    *,
    base: str | None = None,
    license: str | None = None,
    evaluations: Any = None,
) -> str:
    """The text of ``README.md``, with metadata that the hub reads.

    ``record``: of the checkpoint, as it is published. ``base``: the hub id of the dense model; None where it is not
    known. ``evaluations``: of `llmpruner.evaluate`.
    """
    local = (structure.record or {}).get("base_path")
    if license is not None and not _LICENCE.fullmatch(license):
        raise SettingsError(f"--license '{license}': expected an identifier in lower case, such as apache-2.0, mit")
    licence = licence_of(base, local) if license is None else {"license": license}
    tags = ["llmpruner", "pruned"]
    data = ModelCardData(
        base_model=base, library_name="transformers", pipeline_tag="text-generation", tags=tags, **licence
    )
    config = llmpruner.read_json(Path(structure.path or structure.ref) / "config.json")
    dense, graph = llmpruner.build_graph(structure.family, structure.config), structure.graph
    decoder = (dense.decoder_parameters, graph.decoder_parameters)
    parameters = (dense.total_parameters, graph.total_parameters)
    plans = [PruningPlan.model_validate(plan) for plan in record["plans"]]
    environment = Environment(
        loader=PackageLoader("llmpruner_hub", "."), trim_blocks=True, lstrip_blocks=True, autoescape=False,
        undefined=StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template("card.md.j2").render(
        metadata=data.to_yaml(),
        repo=repo,
        hub_id=base,
        base=base or Path(plans[0].base.model).name,
        licence=licence,
        headline=(*parameters, "parameters") if len(set(decoder)) == 1 else (*decoder, "decoder's parameters"),
        decoder=decoder,
        parameters=parameters,
        shim="llmpruner" in config,
        quantised=(config.get("quantization_config") or {}).get("quant_method"),
        steps=[(plan, *plan.table()) for plan in plans],
        recoveries=record.get("recovery") or (),
        loss_text=llmpruner.loss_text,
        evaluations=evaluations,
        names=[Path(each.name).name for each in evaluations or ()],
        version=record.get("llmpruner", ""),
    )


def licence_of(base: str | None, path: str | None) -> dict[str, Any]:
    """The licence that the card of the dense model states, as keys of a card's metadata: in its local directory
    ``path``, or in the cache of the hub model ``base``. Empty where no such card is on this machine, or it states
    none."""
    cached = None if base is None else try_to_load_from_cache(base, CARD_FILE)
    files = [Path(path) / CARD_FILE] if path else []
    # The cache answers with a mark of its own for files that are known not to exist.
    files += [Path(cached)] if isinstance(cached, str) else []
    for file in files:
        if not file.is_file():
            continue
        try:
            data = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
        except Exception as error:  # cards have YAML by many hands
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"the licence cannot be read from {file}: {reason}; use --license") from error
        if isinstance(data.license, str):
            return {key: getattr(data, key) for key in ("license", "license_name", "license_link")}
    return {}


def send(repo: str, files: Mapping[str, bytes | Path], *, public: bool = False) -> str:
    """Create the repository unless it exists, and commit all ``files`` at once; returns the URL of the commit.

    ``public``: of a repository that is created; an existing one stays as it is. Raises `OutputError` in one line.
    """
    api = HfApi()
    operations = [CommitOperationAdd(name, f if isinstance(f, bytes) else str(f)) for name, f in files.items()]
    try:
        api.whoami()
        api.create_repo(repo, private=not public, exist_ok=True)
        done = api.create_commit(repo, operations, commit_message="Pruned with llmpruner")
    except (OSError, ValueError, HTTPError) as error:
        raise OutputError(f"'{repo}' cannot be written: {_reason(error)}") from error
    return str(done.commit_url)


def _reason(error: Exception) -> str:
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, LocalTokenNotFoundError):
        return f"there is no token on this machine; {login}"
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"the token is not valid, or may not write there; {login}"
    return str(error).splitlines()[0]
