"""Curves of ``llmpruner sensitivity``: the divergence that cuts of each group alone cause, and shares by them."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ...component import ComponentSettings
from ...errors import DataError, SelectionError, SettingsError, first_line
from ...structure.coupling import CoupledGroup
from ...structure.queues import Queue
from .base import Allocation, AllocationTask, AllocationUse, Taken
from .ranking import GlobalRanking
from .sensitivity import per_saving


@dataclass(frozen=True)
class Point:
    """``removed``: number of units that were removed; ``divergence``: KL divergence of the cut model from the dense one
    in nats per token."""

    removed: int
    divergence: float


@dataclass(frozen=True)
class GroupCurve:
    """The curve of one group. ``points``: in ascending order of units, without the whole group."""

    name: str
    kind: str
    layer: int | None
    units: int
    points: tuple[Point, ...]

    def at(self, removed: float) -> float:
        """The divergence with ``removed`` units gone: interpolated from 0 at 0, and beyond the last point along the
        line through the last two."""
        known = (Point(0, 0.0), *self.points)
        place = min(max(bisect_left([point.removed for point in known], removed), 1), len(known) - 1)
        one, other = known[place - 1], known[place]
        slope = (other.divergence - one.divergence) / (other.removed - one.removed)
        return one.divergence + slope * (removed - one.removed)


@dataclass(frozen=True)
class Curve:
    """What ``llmpruner sensitivity`` writes. ``measured``: how: the model, the criterion, the calibration text."""

    groups: tuple[GroupCurve, ...]
    measured: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        return {"version": 1, "measured": dict(self.measured), "groups": [asdict(group) for group in self.groups]}

    @classmethod
    def read(cls, file: Path) -> Curve:
        """Raises `DataError` for a file that is missing, or was not written by ``llmpruner sensitivity``."""
        try:
            found = _File.model_validate(json.loads(file.read_text(encoding="utf-8")))
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror or error}") from None
        except (ValueError, ValidationError) as error:
            raise DataError(
                f"{file} was not written by `llmpruner sensitivity`, or is damaged: {first_line(error)}"
            ) from None
        return cls(tuple(group.curve() for group in found.groups), found.measured)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _FilePoint(_Strict):
    removed: int = Field(ge=1)
    divergence: float


class _FileGroup(_Strict):
    name: str
    kind: str
    layer: int | None
    units: int
    points: list[_FilePoint] = Field(min_length=1)

    def curve(self) -> GroupCurve:
        points = sorted({point.removed: point.divergence for point in self.points}.items())
        return GroupCurve(self.name, self.kind, self.layer, self.units, tuple(Point(*point) for point in points))


class _File(_Strict):
    version: int = Field(ge=1, le=1)
    measured: dict[str, Any]
    groups: list[_FileGroup] = Field(min_length=1)


def _readable(file: Path) -> Path:
    try:
        Curve.read(file)
    except DataError as error:
        raise ValueError(f"expected a curve: {error}") from None
    return file


class MeasuredCurve(Allocation):
    """As `Sensitivity`, from a curve that was measured before: steps are ranked over all groups by divergence per saved
    amount along the lower convex hull of each group's points. Groups that must keep the same number of units have the
    sum of their curves."""

    name = "curve"
    summary = "shares by a curve that `llmpruner sensitivity` measured"
    one_step = True

    class Settings(ComponentSettings):
        file: Annotated[
            Annotated[Path, AfterValidator(_readable)] | None,
            Field(description="The file that `llmpruner sensitivity` wrote; it must be given."),
        ] = None

    settings: Settings

    def _curve(self) -> Curve:
        if self.settings.file is None:
            raise SettingsError(f"--allocation {self.name} needs a curve: --set {self.name}.file=FILE")
        return Curve.read(self.settings.file)

    def check(self, groups: Sequence[CoupledGroup]) -> None:
        curves = {curve.name: curve for curve in self._curve().groups}
        for group in groups:
            if group.name not in curves:
                raise SelectionError(
                    f"{self.settings.file} has no curve of '{group.name}'; measure it with `llmpruner sensitivity` and "
                    "the same --kinds and --layers"
                )
            if curves[group.name].units != group.units:
                raise SelectionError(
                    f"{self.settings.file} was measured on another model: '{group.name}' had "
                    f"{curves[group.name].units} units there and has {group.units}"
                )

    def doubts(self, use: AllocationUse) -> Sequence[str]:
        measured = self._curve().measured
        start = f"{self.settings.file} was measured "
        found = [start + on for on in _of_another_model(measured, use)]
        for what, now in (("criterion", use.criterion), ("compensation", use.compensation)):
            if measured.get(what, now) != now:
                found.append(f"{start}with the {what} {measured[what]}, and this prune has {now}")
        return found

    def allocate(self, task: AllocationTask) -> Taken:
        self.check([queue.group for queue in task.queues])
        curves = {curve.name: curve for curve in self._curve().groups}
        ranked = []
        for queue in task.queues:
            own = [curves[name] for name in queue.members or (queue.group.name,)]
            points = [
                (steps, sum(curve.at(queue.removed_after(steps)) for curve in own)) for steps in _steps(queue, own)
            ]
            ranked.append(replace(queue, scores=tuple(per_saving(queue, points, task.meter))))
        return GlobalRanking().allocate(replace(task, queues=ranked))


def _of_another_model(measured: Mapping[str, Any], use: AllocationUse) -> Iterator[str]:
    """How the model that was measured differs; nothing for the same one. A curve of the base model may be meant for a
    model that was tuned from it."""
    was, files = str(measured.get("model")), measured.get("files")
    if measured.get("structure", use.structure) != use.structure:
        yield f"on '{was}', whose parameters differ in name or shape from those of '{use.model}'"
    elif files is not None and use.files is not None:
        if files != use.files:
            yield f"on '{was}', whose files are not those of '{use.model}'"
    elif Path(was).name != Path(use.model).name:
        yield f"on '{was}', and this is '{use.model}'"


def _steps(queue: Queue, curves: Sequence[GroupCurve]) -> list[int]:
    """None, those nearest to the measured points, and all."""
    measured = {queue.steps_for(point.removed) for curve in curves for point in curve.points}
    return sorted({0, *measured, len(queue.steps)})
