"""PruningPlan: what goes and why, as one small JSON file that can be reviewed, diffed and replayed.

A plan is the only thing surgery reads. It holds no time of day and nothing of the machine, so the same command
gives the same bytes; only a budget of latency brings in the machine, and then the plan says what was measured there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from ..errors import PlanError
from ..files import write_text
from .coupling import CouplingGraph
from .kept import check_kept

if TYPE_CHECKING:
    from .kept import Kept


SCHEMA_VERSION: Final = 1
_MOST_UNITS: Final = 100_000_000


def _pack(units: Sequence[int]) -> str:
    """``0-4,7``: runs of consecutive units, so that a person can read and diff them."""
    runs: list[list[int]] = []
    for unit in units:
        if runs and unit == runs[-1][1] + 1:
            runs[-1][1] = unit
        else:
            runs.append([unit, unit])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def _unpack(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    units: list[int] = []
    for run in filter(None, value.split(",")):
        first, _, last = run.partition("-")
        start, stop = int(first), int(last or first) + 1
        # No model is that wide, and spelling the run out would take the memory that it claims.
        if stop - start > _MOST_UNITS:
            raise ValueError(f"'{run}' is more than {_MOST_UNITS:,} units")
        units += range(start, stop)
    return tuple(units)


Units = Annotated[tuple[int, ...], BeforeValidator(_unpack), PlainSerializer(_pack, return_type=str)]


class Frozen(BaseModel):
    """Strict, immutable: an unknown key is an error, not a surprise."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseRef(Frozen):
    """The model a plan was made for. ``structure`` is `structure_of` its coupling graph."""

    model: str
    revision: str | None = None
    structure: str


Budget = Literal["decoder", "parameters", "bytes", "macs", "kv-cache", "latency"]
BUDGETS: Final[tuple[Budget, ...]] = get_args(Budget)


class Timing(Frozen):
    """How long decoder layers of one shape, or everything outside of the layers, take for one token.

    ``layers``: whom it stands for; none for what is outside. ``ms``: milliseconds per token while nothing is cut.
    ``groups``: name of a group, without its layer → (units kept, ms), from most units to fewest.
    """

    layers: Units
    ms: float
    groups: dict[str, tuple[tuple[int, float], ...]] = {}


class LatencyTable(Frozen):
    """What was measured for a budget of latency: one token at a time while ``context`` tokens are in the cache."""

    device: str
    dtype: str
    context: int
    timings: tuple[Timing, ...]


class Target(Frozen):
    """How much was asked for. ``ratio``: share of ``budget`` to remove; ``parameters``: total parameters to be left;
    ``units``: share of the units of every selected group, as the paper counts.

    ``context``: tokens in the cache, for the budgets that depend on it. ``latency``: what was measured; a target that
    brings it is met without measuring again, and so gives the same plan on any machine.
    """

    by: Literal["ratio", "parameters", "units"]
    amount: float
    budget: Budget = "decoder"
    context: int | None = None
    latency: LatencyTable | None = None

    @model_serializer(mode="wrap")
    def _what_applies(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        of_budget = self.by == "ratio"
        return {name: value for name, value in values.items() if value is not None and (of_budget or name != "budget")}


class Estimation(Frozen):
    """How importance was measured."""

    criterion: str
    variant: str | None = None
    reduction: str
    calibration: str | None = None
    fingerprint: str | None = None


class Selection(Frozen):
    """How importance became a choice."""

    kinds: tuple[str, ...]
    layers: Units
    allocation: str
    normalization: str = "none"
    steps: int = 1
    round_to: int = 1


class Compensation(Frozen):
    """How what reads cut units is repaired before the cut. ``method``: ``refit`` or ``bias``; ``mix``: see
    `llmpruner.compensation.repair`; the calibration text is drawn with the plan's seed."""

    method: Literal["refit", "bias"]
    mix: float
    calibration: str
    fingerprint: str
    samples: int
    length: int


class GroupCut(Frozen):
    """One group that loses units."""

    kind: str
    layer: int | None = None
    units: int
    kept: Units


class PruningPlan(Frozen):
    """What goes and why. ``cuts``: group name → what stays of it; groups that keep everything are left out."""

    schema_version: Literal[1] = SCHEMA_VERSION
    base: BaseRef
    family: str
    estimation: Estimation
    selection: Selection
    compensation: Compensation | None = None
    target: Target
    seed: int
    cuts: dict[str, GroupCut]

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        return {name: group.kept for name, group in self.cuts.items()}

    def check(self, graph: CouplingGraph) -> None:
        """Raise `PlanError` unless the plan was made for a model of this structure and obeys its groups."""
        if self.base.structure != structure_of(graph):
            raise PlanError(
                f"this plan was made for '{self.base.model}' ({self.family}), whose parameters differ from this "
                "model's in name or shape; make a new plan with `llmpruner plan`"
            )
        check_kept(graph, self.kept)

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"

    def save(self, path: Path) -> None:
        """Write beside ``path``, then rename; an existing file is replaced only as a whole."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> PruningPlan:
        """Raises `PlanError` with the first thing that is wrong."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read plan {path}: {getattr(error, 'strerror', None) or error}") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, name: str) -> PruningPlan:
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise PlanError(f"{name} is not a pruning plan: {where + ': ' if where else ''}{first['msg']}") from error


def structure_of(graph: CouplingGraph) -> str:
    """SHA-256 over parameter names and shapes: what two models must share for a plan to fit both."""
    lines = sorted(f"{name} {list(shape)}" for name, shape in graph.shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def cuts_of(graph: CouplingGraph, kept: Kept) -> dict[str, GroupCut]:
    """The plan's record of ``kept``, in the graph's order, without groups that lose nothing."""
    return {
        group.name: GroupCut(kind=group.kind, layer=group.layer, units=group.units, kept=tuple(kept[group.name]))
        for group in graph.groups
        if group.name in kept and len(kept[group.name]) < group.units
    }
