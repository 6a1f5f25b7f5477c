"""The folder with the state of a training: for one job, of which it keeps the identity, and for one run at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from ..engine.ranks import Ranks
from ..errors import OutputError
from ..files import holds_files, write_failure, write_text
from ..folders import Held, alone_in
from ..models.weights import Weights
from ..settings import RecoverSettings
from .base import RecoveryStrategy
from .dense_text import WRITTEN_FILE
from .shared_settings import shared_settings
from .training_data import TrainingData

_IDENTITY = "job.json"


def check_work_dir(work_dir: Path) -> None:
    """Raise `OutputError` for a directory that is neither new, nor empty, nor that of a recovery job."""
    try:
        ours = any((work_dir / name).is_file() for name in (_IDENTITY, WRITTEN_FILE))
        if work_dir.exists() and not ours and holds_files(work_dir):
            raise OutputError(f"{work_dir} is not empty and holds no recovery job; choose another directory")
    except OSError as error:
        raise OutputError(f"{work_dir} cannot be used: {error.strerror}") from None


def claim(work_dir: Path, identity: dict[str, Any]) -> None:
    """Create ``work_dir`` for this job. Raises `OutputError` if it exists and belongs to another one."""
    file = work_dir / _IDENTITY
    try:
        if file.is_file():
            found = dict(json.loads(file.read_text()))
            changed = [key for key, value in identity.items() if found.get(key) != value]
            if changed:
                raise OutputError(
                    f"{work_dir} holds the state of another recovery job ({', '.join(changed)} differ); "
                    "delete it or choose another directory"
                )
            return
        check_work_dir(work_dir)
        work_dir.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(identity, indent=2) + "\n")
    except (ValueError, TypeError):
        raise OutputError(f"{file} is damaged; delete {work_dir} and start again") from None
    except OSError as error:
        raise OutputError(f"{work_dir} cannot be used: {error.strerror}") from None


class Alone:
    """A folder that is locked for one run. ``held``: the lock; None in all processes but the first, which writes the
    files."""

    def __init__(self, held: Held | None) -> None:
        self.held = held

    def check(self) -> None:
        """Raise `OutputError` where the folder was taken from the run."""
        if self.held is not None:
            self.held.check()


def alone_with(ranks: Ranks, work_dir: Path, stack: ExitStack, *, anew: bool = False) -> Alone:
    """``work_dir`` for this run alone, until ``stack`` ends, see `alone_in`. All processes must call it together."""
    found: list[Held] = []
    ranks.from_first(lambda: found.append(stack.enter_context(alone_in(work_dir, anew=anew))))
    return Alone(found[0] if found else None)


@contextmanager
def writing_state(work_dir: Path) -> Iterator[None]:
    """Raise `OutputError` where the disk does not take what a strategy writes: libraries raise errors of their own."""
    try:
        yield
    except Exception as error:
        reason = write_failure(error)
        if reason is None:
            raise
        raise OutputError(
            f"the state of the training in {work_dir} cannot be written: {reason}; the same command goes on from the "
            "last one that was"
        ) from error


def job_identity(
    weights: Weights, data: TrainingData, strategy: RecoveryStrategy, settings: RecoverSettings, dense: str | None
) -> dict[str, Any]:
    """All that the result depends on, as JSON values. ``weights``: of the pruned model; ``dense``: what identifies the
    dense model; None for strategies that do not need it."""
    validation = [] if data.validation is None else data.validation.rows
    found = {
        "strategy": strategy.name,
        "strategy settings": strategy.record(),
        "settings": shared_settings(settings),
        "examples": _digest(data.rows.rows),
        "validation examples": _digest(validation),
        "processes": Ranks.current().count,
        "model": _weights_fingerprint(weights),
    }
    return found if dense is None else {**found, "dense model": dense}


def _digest(rows: list[dict[str, list[int]]]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _weights_fingerprint(weights: Weights) -> str:
    """SHA-256 over name, shape, dtype and about 64 evenly spaced weights of every parameter, which is enough to
    distinguish models."""
    names: dict[int | None, list[str]] = {}
    for name, _ in weights.model.named_parameters():
        names.setdefault(weights.number(name), []).append(name)
    lines: dict[str, str] = {}
    for part, found in names.items():
        with weights.part(part):
            lines |= {name: _fingerprint_line(name, weights.model.get_parameter(name)) for name in found}
    digest = hashlib.sha256()
    for name, _ in weights.model.named_parameters():
        digest.update(lines[name].encode())
    return digest.hexdigest()


def _fingerprint_line(name: str, parameter: torch.Tensor) -> str:
    flat = parameter.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // 64)].float().cpu().tolist()
    return f"{name} {tuple(parameter.shape)} {parameter.dtype} {sample}\n"
