"""The recover stage: examples in, a plain model that was trained on them out."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.instructions import Examples, load_examples, tokenise
from ..errors import OutputError, PluginError
from .base import RecoveryJob, RecoverySettings, RecoveryStrategy, TrainingResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..families.family import ModelFamily
    from ..structure.coupling import CouplingGraph

_FINGERPRINT = "job.json"


@dataclass(frozen=True)
class RecoveryResult:
    """``model``: plain, of the class it had before; a peft model when adapters were not merged. ``losses``:
    per optimizer step. ``seconds``: of this run, without what an interrupted one had spent. ``examples``:
    trained on."""

    model: Any
    strategy: str
    losses: tuple[float, ...]
    seconds: float
    examples: int
    source: str
    fingerprint: str
    trainable_parameters: int
    notes: tuple[str, ...]


def recover(
    model: PreTrainedModel,
    tokenizer: Any,
    graph: CouplingGraph,
    family: ModelFamily,
    source: str | Examples,
    strategy: RecoveryStrategy,
    settings: RecoverySettings,
    work_dir: Path,
    *,
    merge: bool = True,
    limit: int | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> RecoveryResult:
    """Train ``model`` (in place) with ``strategy`` on ``source``, a file, a dataset's name, or loaded
    examples.

    ``graph`` is the coupling graph of ``model`` as it is now. Everything is drawn from ``settings.seed``.
    When ``work_dir`` holds the state of the same job, training continues from it; the state of another job
    there is an `OutputError`. The directory stays; delete it once the result is saved.
    """
    if isinstance(source, str):
        source = load_examples(source, family, limit=limit, seed=settings.seed)
    rows = tokenise(source, tokenizer, cutoff=settings.cutoff, loss_on=settings.loss_on)
    _claim(work_dir, _job_identity(model, rows, strategy, settings))
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    started = time.perf_counter()
    result = strategy.train(RecoveryJob(model, tokenizer, rows, graph, settings, work_dir, on_step))
    seconds = time.perf_counter() - started
    if not isinstance(result, TrainingResult):
        raise PluginError(f"recovery strategy '{strategy.name}' returned {type(result).__name__}, not a TrainingResult")
    trained = merge_adapters(result.model) if merge else result.model
    if not hasattr(trained, "peft_config"):
        trained.requires_grad_(True)
        for name in frozen:
            trained.get_parameter(name).requires_grad_(False)
    left_out = len(source.rows) - len(rows)
    notes = (
        (*result.notes, f"{left_out} examples had nothing to train on and were left out") if left_out else result.notes
    )
    return RecoveryResult(
        trained.eval(),
        strategy.name,
        result.losses,
        seconds,
        len(rows),
        source.source,
        source.fingerprint,
        result.trainable_parameters,
        notes,
    )


def merge_adapters(model: Any) -> Any:
    """The plain model with its peft adapters added to the weights, in their dtype; anything else as it is."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def _job_identity(
    model: PreTrainedModel,
    rows: list[dict[str, list[int]]],
    strategy: RecoveryStrategy,
    settings: RecoverySettings,
) -> dict[str, Any]:
    return {
        "strategy": strategy.name,
        "settings": asdict(settings),
        "examples": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "model": _weights_fingerprint(model),
    }


def _weights_fingerprint(model: PreTrainedModel) -> str:
    """Names, shapes, dtypes, and 64 weights of every parameter: tells two models apart at the cost of no full
    pass."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu().tolist()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {sample}\n".encode())
    return digest.hexdigest()


def _claim(work_dir: Path, identity: dict[str, Any]) -> None:
    record = work_dir / _FINGERPRINT
    try:
        if record.is_file():
            found = json.loads(record.read_text())
            changed = [key for key, value in identity.items() if found.get(key) != value]
            if changed:
                raise OutputError(
                    f"{work_dir} holds the state of another recovery job ({', '.join(changed)} differ); "
                    "delete it or choose another directory"
                )
            return
        if work_dir.exists() and any(work_dir.iterdir()):
            raise OutputError(f"{work_dir} is not empty and holds no recovery job; choose another directory")
        work_dir.mkdir(parents=True, exist_ok=True)
        partial = record.with_suffix(".partial")
        partial.write_text(json.dumps(identity, indent=2) + "\n")
        partial.rename(record)
    except json.JSONDecodeError:
        raise OutputError(f"{record} is damaged; delete {work_dir} and start again") from None
    except OSError as error:
        raise OutputError(f"{work_dir} cannot be used: {error.strerror}") from None
