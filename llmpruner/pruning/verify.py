"""``llmpruner verify``: whether a checkpoint is as it was saved, and its weights those of the dense model.

The checks, in order: the SHA-256 of its files; the names and shapes of its tensors, by its plans; the weights that the
cut left as they are, bit for bit those of the dense model; and the logits. Weights are read one layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from os.path import exists
from pathlib import Path
from typing import Any

import torch

from ..catalog import Catalog
from ..discovery.opening import Opener
from ..discovery.oracle import TOLERANCE, distance, kept_tokens, logits, silenced
from ..errors import CheckpointError, LlmprunerError, MissingExtraError, ModelError, PluginError, UnsupportedModelError
from ..files import read_json
from ..models.devices import free_memory
from ..models.messages import ALLOW
from ..models.model import Model, Structure
from ..models.numbers import loaded_bytes
from ..models.opening import load_model, open_streamed, open_weights, why_not_streamed
from ..models.record import RECORD_FILE, check_index, damaged_files, has_shards, read_any_record, recorded_files
from ..models.reference import adapter_base
from ..models.weights import StreamedWeights, Weights
from ..progress import QUIET
from ..settings import DEMO
from ..structure.coupling import CouplingGraph, Role
from ..structure.kept import Kept, compose, layer_numbers, path_after, restrict
from ..structure.plan import PruningPlan
from ..values import counted
from .compensation.base import Compensation
from .saving import cut_model

PASSED, DAMAGED, NOT_CHECKED = "passed", "damaged", "not checked"
_CHECKS = ("files", "shapes", "weights", "logits")


@dataclass(frozen=True)
class Check:
    """``detail``: what was compared; for damage, the file or the tensor; else why it is not checked."""

    name: str
    state: str
    detail: str


@dataclass(frozen=True)
class Verification:
    """The result of `verify_checkpoint`."""

    directory: str
    checks: tuple[Check, ...]

    @property
    def damage(self) -> tuple[str, ...]:
        """A line for each thing that is damaged."""
        return tuple(check.detail for check in self.checks if check.state == DAMAGED)

    def as_json(self) -> dict[str, Any]:
        checks = [{"check": check.name, "state": check.state, "detail": check.detail} for check in self.checks]
        return {"directory": self.directory, "damaged": bool(self.damage), "checks": checks}


class _NotComparable(Exception):
    """Nothing more can be compared; the message says why."""


def verify_checkpoint(directory: Path, base: str | None, opener: Opener) -> Verification:
    """Check ``directory``. ``base``: reference of the dense model, instead of that in the record. Damage is part of the
    result. Raises `ModelError` where there is no checkpoint, and where ``base`` can't be opened or is another model."""
    recorded = (directory / RECORD_FILE).is_file() or adapter_base(directory) is not None
    if not recorded and not has_shards(directory):
        raise ModelError(
            f"'{directory}' has neither a {RECORD_FILE} nor safetensors files, so there is nothing to verify"
        )
    checks = _file_checks(directory)
    reason = "the files are damaged"
    if not any(check.state == DAMAGED for check in checks):
        try:
            for name, compared in _model_checks(directory, base, opener):
                checks.append(Check(name, PASSED, compared))
        except _NotComparable as why:
            reason = str(why)
        except CheckpointError as error:
            checks.append(Check(_CHECKS[len(checks)], DAMAGED, str(error)))
    done = [check.name for check in checks]
    rest = [Check(name, NOT_CHECKED, reason) for name in _CHECKS if name not in done]
    return Verification(str(directory), (*checks, *rest))


def _file_checks(directory: Path) -> list[Check]:
    try:
        recorded = recorded_files(read_any_record(directory))
        damaged = list(damaged_files(directory, recorded or {}))
    except CheckpointError as error:
        damaged, recorded = [str(error)], {}
    if damaged:
        return [Check("files", DAMAGED, line) for line in damaged]
    if recorded is None:
        return [Check("files", NOT_CHECKED, "there is no record with hashes")]
    return [Check("files", PASSED, f"SHA-256 of {counted(len(recorded), 'file')} is as recorded")]


def _model_checks(directory: Path, named: str | None, opener: Opener) -> Iterator[tuple[str, str]]:
    """The checks of shapes, weights and logits, with what was compared. Raises `CheckpointError` for damage."""
    opener.progress.status("comparing shapes with the plans")
    structure, weights = _opened(directory, opener)
    yield "shapes", f"those of {counted(len(structure.plans), 'plan')}, no tensor missing or unknown"
    if not structure.plans:
        raise _NotComparable("it was not pruned by llmpruner")
    base, record = structure.plans[0].base.model, structure.record or {}
    if named is None and not any(map(exists, (base, str(record.get("base_path"))))) and base != DEMO:
        raise _NotComparable(f"the base '{base}' is not on this machine; name it with --base")
    if record.get("recovery") or record.get("adapters"):
        raise _NotComparable("weights were trained after the cut")
    dense = _dense(structure, named, _as_stored(directory, opener))
    opener.progress.status(f"comparing with '{dense.ref}'")
    changed = _changed_modules(dense.graph, structure.plans, opener.catalog)
    vocabulary = dense.network.get_input_embeddings().weight.shape[0]
    random = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    kept: Kept = {}
    for plan in structure.plans:
        kept = compose(dense.graph, kept, plan.kept)
    tokens = kept_tokens(random, dense.graph, kept)
    expected = None
    if not changed and dense.streamed is None and dense.network.dtype == torch.float32:
        # What is silenced is cut afterwards, so that no copy is needed.
        with silenced(dense.network, dense.graph, kept):
            expected = logits(dense.network, tokens.before)[..., tokens.predicted]
    for plan in structure.plans:
        dense = cut_model(dense, plan)
    yield "weights", _compare_weights(weights, dense.weights, changed, dense.ref)
    if changed:
        raise _NotComparable("weights were fitted to compensate for the cut")
    what = "a new cut of the base" if expected is None else "the base with the removed units silenced"
    expected = logits(dense.network, tokens.after) if expected is None else expected
    difference = distance(logits(weights.model, tokens.after).float(), expected.float())
    if not difference <= (TOLERANCE if weights.model.dtype == torch.float32 else 2e-2):
        raise CheckpointError(
            f"the logits differ from {what} by {difference:.0e} of the largest, although the weights are right: "
            "config.json or the code next to it is not that of the model"
        )
    yield "logits", f"those of {what} (difference {difference:.0e} of the largest)"


def _as_stored(directory: Path, opener: Opener) -> Opener:
    """For the CPU, and the dtype that the tensors are stored in, so that they are compared as they are."""
    dtype = read_json(directory / "config.json").get("dtype")
    dtype = dtype if dtype in ("float32", "bfloat16", "float16") else "float32"
    load = opener.load.model_copy(update={"dtype": dtype, "device": "cpu"})
    return replace(opener, load=load, progress=QUIET)


def _opened(directory: Path, opener: Opener) -> tuple[Structure, StreamedWeights]:
    """The checkpoint, once its tensors are those of its plans."""
    if (base := adapter_base(directory)) is not None:
        raise _NotComparable(f"these are adapters; '{base}', which they change, is verified on its own")
    if (form := (read_any_record(directory) or {}).get("format")) is not None:
        raise _NotComparable(f"the format {form} is for other programs, and llmpruner does not open it")
    try:
        check_index(directory)
        opener = _as_stored(directory, opener)
        structure = opener.structure(directory)
        if (why := why_not_streamed(structure, cuts=False)) is not None:
            raise _NotComparable(f"only weights that can be read layer by layer are compared: {why}")
        weights = open_weights(structure, opener.load)
    except LlmprunerError as error:
        # A plugin, a library or the leave to run code is missing, which is no damage.
        if isinstance(error, (PluginError, UnsupportedModelError, MissingExtraError)) or ALLOW in str(error):
            raise _NotComparable(str(error)) from error
        raise CheckpointError(str(error)) from error
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:  # of transformers
        raise CheckpointError(f"{directory} cannot be opened: {type(error).__name__}: {error}") from error
    if unknown := sorted(map(str, weights.info["unexpected_keys"])):
        raise CheckpointError(f"{directory}: tensor '{unknown[0]}' belongs to no module of the model")
    return structure, weights


def _dense(structure: Structure, named: str | None, opener: Opener) -> Model:
    """The dense model, in memory if it takes less than half of the free memory, else read layer by layer."""
    try:
        dense, load = opener.dense_structure(structure, named), opener.load
        large = loaded_bytes(dense, load) > free_memory(opener.device) // 2
        if large and why_not_streamed(dense, cuts=False) is None:
            return open_streamed(dense, load)
        return load_model(dense, load)
    except LlmprunerError as error:
        if named is not None:
            raise
        raise _NotComparable(str(error)) from error


def _changed_modules(graph: CouplingGraph, plans: tuple[PruningPlan, ...], catalog: Catalog) -> set[str]:
    """Paths of the modules, in the pruned model, whose weights a compensation changed."""
    changed: set[str] = set()
    for plan in plans:
        if plan.compensation is not None:
            record = plan.compensation
            compensation = catalog[Compensation].create(record.name, record.settings)
            if not compensation.changes_readers_alone:
                raise _NotComparable(f"{compensation.label()} may have changed any weight")
            changed |= {
                span.parameter.rpartition(".")[0]
                for name in plan.kept
                for span in graph.by_name[name].spans_with(Role.CONSUMES)
            }
        numbers = layer_numbers(graph, plan.kept)
        changed = {after for path in changed if (after := path_after(path, graph.layers, numbers))}
        graph = restrict(graph, plan.kept)
    return changed


def _compare_weights(checked: StreamedWeights, expected: Weights, changed: set[str], base: str) -> str:
    """Compare all weights but those in ``changed`` modules, bit for bit; returns what was compared."""
    count = left = 0
    for part in checked.numbers:
        with checked.part(part), expected.part(part):
            tensors, others = (dict(w.model.named_parameters(remove_duplicate=False)) for w in (checked, expected))
            for name in sorted(name for name in others if checked.number(name) == part):
                if name.rpartition(".")[0] in changed:
                    left += 1
                elif name not in tensors or not torch.equal(tensors[name], others[name]):
                    raise CheckpointError(f"tensor '{name}' is not that of the base '{base}', cut by the plans")
                else:
                    count += 1
    rest = f"; {left} that a compensation fitted are left out" if left else ""
    return f"{count} tensors are those of '{base}', bit for bit{rest}"
