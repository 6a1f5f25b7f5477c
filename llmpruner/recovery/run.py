"""The recover stage: training a pruned model on instruction data."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.weights import Weights
from ..errors import OutputError, PluginError
from ..files import write_text
from ..settings import RecoverSettings, option_of
from .base import LayerWalk, RecoveryJob, RecoveryStrategy, TrainingResult
from .dense_text import WRITTEN_FILE
from .examples import Examples, load_examples, tokenise

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..families.family import ModelFamily
    from ..structure.coupling import CouplingGraph

_IDENTITY = "job.json"
_NOT_SHARED = {"data", "strategy", "limit", "merge", "settings"}
"""Fields of `RecoverSettings` that are not shared by strategies, or recorded separately."""


@dataclass(frozen=True)
class RecoveryResult:
    """``model``: of the same class as before; a peft model where adapters were not merged. ``losses``: see
    `TrainingResult`. ``seconds``: of this run, without those before an interruption. ``examples``: their number.
    ``fingerprint``: `Examples.fingerprint`."""

    model: Any
    strategy: RecoveryStrategy
    settings: RecoverSettings
    losses: tuple[float, ...]
    seconds: float
    examples: int
    source: str
    fingerprint: str
    trainable_parameters: int
    notes: tuple[str, ...]
    details: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The training as JSON values, for ``llmpruner.json``."""
        return {
            "strategy": self.strategy.name,
            "strategy_settings": self.strategy.record(),
            "settings": shared_settings(self.settings),
            "data": self.source,
            "fingerprint": self.fingerprint,
            "examples": self.examples,
            "trainable_parameters": self.trainable_parameters,
            "losses": list(self.losses),
            **self.details,
        }


def recover(
    model: PreTrainedModel,
    tokenizer: Any,
    graph: CouplingGraph,
    family: ModelFamily,
    strategy: RecoveryStrategy,
    settings: RecoverSettings,
    work_dir: Path,
    *,
    examples: Examples | None = None,
    load_teacher: Callable[[], PreTrainedModel] | None = None,
    layers: tuple[int, ...] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    walk: LayerWalk | None = None,
) -> RecoveryResult:
    """Train ``model``, in place, with ``strategy``.

    ``graph``: the coupling graph of ``model``. ``settings``: the name of a strategy and the settings for it have no
    effect, as ``strategy`` has its own. ``examples``: used instead of ``settings.data``. ``load_teacher``: loads the
    dense model, for strategies that need it. ``layers``: see `RecoveryJob`. ``on_step``: called after each optimizer
    step with its number from 1, the number of steps, and its loss. ``walk``: see `RecoveryJob`.

    When ``work_dir`` contains the state of the same job, training continues from it. Delete the directory once the
    result is saved. Raises `OutputError` when it contains anything else, `DataError` for data that cannot be used, and
    `ModelError` when the training diverges.
    """
    if examples is None:
        examples = load_examples(settings.data, family, tokenizer, limit=settings.limit, seed=settings.seed)
    rows = tokenise(examples, tokenizer, cutoff=settings.cutoff, loss_on=settings.loss_on, pack=settings.pack)
    walk = walk or LayerWalk()
    _claim(work_dir, _identity(walk.pruned or Weights(model, graph.layers), rows, strategy, settings))
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    started = time.perf_counter()
    job = RecoveryJob(model, tokenizer, rows, graph, settings, work_dir, on_step, load_teacher, layers, walk)
    result = strategy.train(job)
    seconds = time.perf_counter() - started
    if not isinstance(result, TrainingResult):
        raise PluginError(f"recovery strategy '{strategy.name}' returned {type(result).__name__}, not a TrainingResult")
    trained = merge_adapters(result.model) if settings.merge else result.model
    if not hasattr(trained, "peft_config"):
        trained.requires_grad_(True)
        for name in frozen:
            trained.get_parameter(name).requires_grad_(False)
    left_out = 0 if settings.pack else len(examples.texts) - len(rows)
    notes = (f"{left_out} examples had nothing to train on and were left out",) if left_out else ()
    return RecoveryResult(
        trained.eval(),
        strategy,
        settings,
        result.losses,
        seconds,
        len(rows),
        examples.source,
        examples.fingerprint,
        result.trainable_parameters,
        (*result.notes, *notes),
        result.details,
    )


def shared_settings(settings: RecoverSettings) -> dict[str, Any]:
    """The settings that all strategies share, as JSON values."""
    of_strategy = {name for name in RecoverSettings.model_fields if option_of(RecoverSettings, name).sets}
    return settings.model_dump(mode="json", exclude=_NOT_SHARED | of_strategy)


def merge_adapters(model: Any) -> Any:
    """The base model of a peft model, with the adapters added to its weights; any other model unchanged."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def _identity(
    weights: Weights, rows: list[dict[str, list[int]]], strategy: RecoveryStrategy, settings: RecoverSettings
) -> dict[str, Any]:
    """All that the result depends on, as JSON values."""
    return {
        "strategy": strategy.name,
        "strategy settings": strategy.record(),
        "settings": shared_settings(settings),
        "examples": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "model": _weights_fingerprint(weights),
    }


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


def check_work_dir(work_dir: Path) -> None:
    """Raise `OutputError` for a directory that is neither new, nor empty, nor that of a recovery job."""
    try:
        ours = any((work_dir / name).is_file() for name in (_IDENTITY, WRITTEN_FILE))
        if work_dir.exists() and not ours and any(work_dir.iterdir()):
            raise OutputError(f"{work_dir} is not empty and holds no recovery job; choose another directory")
    except OSError as error:
        raise OutputError(f"{work_dir} cannot be used: {error.strerror}") from None


def _claim(work_dir: Path, identity: dict[str, Any]) -> None:
    """Create ``work_dir`` for this job. Raises `OutputError` if it exists and belongs to another one."""
    file = work_dir / _IDENTITY
    try:
        if file.is_file():
            found = json.loads(file.read_text())
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
    except json.JSONDecodeError:
        raise OutputError(f"{file} is damaged; delete {work_dir} and start again") from None
    except OSError as error:
        raise OutputError(f"{work_dir} cannot be used: {error.strerror}") from None
