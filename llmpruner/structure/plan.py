"""PruningPlan: what is removed and how that was chosen, as a JSON file that can be reviewed, diffed and replayed. It
contains no timestamps, and of the machine only the path of a local model: the same command gives the same bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError, model_serializer

from ..errors import PlanError
from ..files import write_text
from ..values import html_table
from .coupling import LAYER, CouplingGraph
from .kept import Kept, check_kept

SCHEMA_VERSION: Final = 2
By = Literal["ratio", "parameters", "units", "tokens"]


def _pack(units: Sequence[int]) -> str:
    """``0-4,7`` for ``(0, 1, 2, 3, 4, 7)``, which is easier to read and to diff."""
    runs: list[list[int]] = []
    for unit in units:
        if runs and runs[-1][1] == unit - 1:
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
        if not (first.strip().isdecimal() and (last or first).strip().isdecimal()):
            raise ValueError(f"expected numbers of units such as 0-4,7, found '{run[:40]}'")
        start, stop = int(first), int(last or first) + 1
        if stop <= start:
            raise ValueError(f"the run '{run}' goes backwards")
        if stop - start + len(units) > 1 << 22:  # no model is that wide, and the numbers could exhaust memory
            raise ValueError(f"more than {1 << 22:,} units")
        units += range(start, stop)
    return tuple(units)


Units = Annotated[tuple[int, ...], BeforeValidator(_unpack), PlainSerializer(_pack, return_type=str)]


class Frozen(BaseModel):
    """Immutable; an unknown key, and a number that is not finite, is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BaseRef(Frozen):
    """The model a plan was made for. ``model``: its reference; ``revision``: the commit of a hub model. ``structure``:
    SHA-256 over the names and shapes of its parameters; a plan is refused for a model with another."""

    model: str
    revision: str | None = None
    structure: str


class Target(Frozen):
    """The requested amount. ``by``: the meaning of ``amount``: ``ratio``, the share of ``budget`` (a registered name)
    to remove; ``parameters``, the total number of parameters to keep; ``units``, the share of the units of every group
    in scope to remove, as LLM-Pruner counts; ``tokens``, the number of tokens to keep. ``settings``: of the budget."""

    by: By
    amount: float
    budget: str = "decoder"
    settings: dict[str, Any] = {}

    @property
    def counted_in(self) -> str:
        """The name of the budget that costs are counted by."""
        return {"ratio": self.budget, "units": "decoder"}.get(self.by, "parameters")

    @model_serializer(mode="wrap")
    def _what_applies(self, serialize: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        lacks = {"settings": not self.settings, "budget": self.by != "ratio"}
        return {name: value for name, value in serialize(self).items() if not lacks.get(name)}


class EstimationRecord(Frozen):
    """How importance was measured. ``settings``: of the criterion. ``calibration``: the value of ``--calibration``;
    ``sources``: source name → settings, for calibration sources that have settings; ``fingerprint``: SHA-256 of the
    tokens. None or empty where neither scores nor allocation read text."""

    criterion: str
    settings: dict[str, Any] = {}
    reduction: str
    calibration: str | None = None
    sources: dict[str, dict[str, Any]] = {}
    fingerprint: str | None = None


class SelectionRecord(Frozen):
    """How units were selected by their scores. ``kinds``, ``layers``: which units could be removed. ``settings``: of
    the allocation. ``shape``, ``round_to``: of kept widths."""

    kinds: tuple[str, ...]
    layers: Units
    allocation: str
    settings: dict[str, Any] = {}
    steps: int = 1
    shape: Literal["uniform", "free"] = "free"
    round_to: int = 1


class CompensationRecord(Frozen):
    """How weights that read removed units are adapted before the cut. ``calibration``, ``sources``, ``fingerprint``: as
    in `EstimationRecord`. ``samples``, ``length``: shape of the calibration tokens. None or empty without a text."""

    name: str
    settings: dict[str, Any] = {}
    calibration: str | None = None
    sources: dict[str, dict[str, Any]] = {}
    fingerprint: str | None = None
    samples: int | None = None
    length: int | None = None


class GroupCut(Frozen):
    """One group that loses units: how many ``units`` it had, and the numbers, from 0, of those that are ``kept``."""

    kind: str
    layer: int | None = None
    units: int
    kept: Units


class PruningPlan(Frozen):
    """What is removed, and how that was chosen. ``cuts``: group name → its cut, for groups that lose units.
    ``compensation``: None where weights stay. ``seed``: of random numbers. Another ``schema_version`` is refused."""

    schema_version: Literal[2] = SCHEMA_VERSION
    base: BaseRef
    family: str
    estimation: EstimationRecord
    selection: SelectionRecord
    compensation: CompensationRecord | None = None
    target: Target
    seed: int
    cuts: dict[str, GroupCut]

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        """Group name → the units that are kept, in ascending order, for groups that lose units."""
        return {name: group.kept for name, group in self.cuts.items()}

    def check(self, graph: CouplingGraph) -> None:
        """Raise `PlanError` unless the plan was made for a model of this structure and obeys its groups."""
        if self.base.structure != structure_of(graph):
            other = f"'{self.base.model}' ({self.family}), whose parameters differ from this model's in name or shape"
            raise PlanError(f"this plan was made for {other}; make a new plan with `llmpruner plan`")
        check_kept(graph, self.kept)
        if not self.cuts:
            raise PlanError("the plan cuts nothing: its 'cuts' are empty")
        for name, cut in self.cuts.items():
            for what in ("kind", "layer", "units"):
                stated, actual = getattr(cut, what), getattr(graph.by_name[name], what)
                if stated != actual:
                    raise PlanError(f"group '{name}': the plan states {what} {stated}, the model has {actual}")

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The kinds of units, and rows such as ``("0-2,5", "36 of 48")``: what layers with equal cuts keep."""
        kinds = tuple(dict.fromkeys(cut.kind for cut in self.cuts.values()))
        in_layers = {cut.kind for cut in self.cuts.values() if cut.layer is not None}
        alike: dict[tuple[str, ...], list[int]] = {}
        for layer in sorted({cut.layer for cut in self.cuts.values() if cut.layer is not None}):
            cells = (self._kept_text(kind, layer) or ("all" if kind in in_layers else "") for kind in kinds)
            alike.setdefault(tuple(cells), []).append(layer)
        rows: list[tuple[str, ...]] = [(_pack(layers), *cells) for cells, layers in alike.items()]
        if any(across := tuple(self._kept_text(kind, None) for kind in kinds)):
            rows.append(("whole model", *across))
        return kinds, rows

    def _kept_text(self, kind: str, layer: int | None) -> str:
        """``36 of 48``, for layers with the removed ones; empty where no unit is removed."""
        if not (cuts := [cut for cut in self.cuts.values() if (cut.kind, cut.layer) == (kind, layer)]):
            return ""
        gone = sorted(set(range(cuts[0].units)) - set(cuts[0].kept))
        text = f"{sum(len(cut.kept) for cut in cuts):,} of {sum(cut.units for cut in cuts):,}"
        return f"{text} (without {_pack(gone)})" if kind == LAYER else text

    def _repr_html_(self) -> str:
        kinds, rows = self.table()
        return html_table(rows, ("layers", *kinds))

    def to_json(self) -> str:
        """The text of the plan's file."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the JSON to ``path``; on failure an existing file keeps its content. Raises `OutputError`."""
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """The plan in a file. Raises `PlanError` for one that cannot be read, is no plan, or has another version."""
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read plan {path}: {getattr(error, 'strerror', None) or error}") from error
        except ValidationError as error:
            for each in error.errors():
                if each["loc"] == ("schema_version",):
                    reads = f"and this llmpruner reads version {SCHEMA_VERSION}; make a new plan with `llmpruner plan`"
                    raise PlanError(f"{path} is a plan of version {each['input']}, {reads}") from error
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise PlanError(f"{path} is not a pruning plan: {where + ': ' if where else ''}{first['msg']}") from error


def structure_of(graph: CouplingGraph) -> str:
    """SHA-256 over parameter names and shapes. A plan applies to models with the same value."""
    lines = sorted(f"{name} {list(shape)}" for name, shape in graph.shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def dense_units(plans: Sequence[PruningPlan], graph: CouplingGraph) -> dict[str, int]:
    """Group name → its units before the first of ``plans``, for the groups of ``graph``, cut by all, that lost some."""
    dense: dict[str, int] = {}
    numbers = list(range(graph.num_layers))
    for plan in reversed(plans):
        for cut in plan.cuts.values():
            if cut.kind == LAYER:
                numbers = [cut.kept[number] for number in numbers]
        for group in graph.groups:
            before = group.name if group.layer is None else group.in_layer(numbers[group.layer])
            if before in plan.cuts:
                dense[group.name] = plan.cuts[before].units
    return dense


def cuts_of(graph: CouplingGraph, kept: Kept) -> dict[str, GroupCut]:
    """``kept`` as the ``cuts`` of a plan: in the graph's order, without groups that keep all units."""
    losing = [group for group in graph.groups if len(kept.get(group.name, range(group.units))) < group.units]
    return {g.name: GroupCut(kind=g.kind, layer=g.layer, units=g.units, kept=tuple(kept[g.name])) for g in losing}
