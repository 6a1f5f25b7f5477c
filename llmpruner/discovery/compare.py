"""Comparing declared groups with discovered ones, parameter by parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..structure.coupling import CoupledGroup, Role, Span, runs

Slot = tuple[str, int]
"""A parameter (or buffer) and one of its axes."""


def differences(declared: Iterable[CoupledGroup], discovered: Iterable[CoupledGroup]) -> tuple[str, ...]:
    """One line for each parameter in which a declared group differs from the discovered group of the same name: a span
    that is missing, one that discovery does not have, or other indices, roles or offsets. A difference that occurs in
    several layers is reported once, with the number of the others. Groups without a counterpart are not compared."""
    found = {group.name: group for group in discovered}
    lines: dict[str, list[str]] = {}
    for group in declared:
        if group.name in found and group.spans:
            for line in _between(group, found[group.name]):
                lines.setdefault(_without_layer(line, group.layer), []).append(line)
    return tuple(first + _others(len(others)) for first, *others in lines.values())


def _others(count: int) -> str:
    return f" (and alike in {count} other {'layer' if count == 1 else 'layers'})" if count else ""


def _without_layer(line: str, layer: int | None) -> str:
    return line if layer is None else line.replace(f".{layer}.", ".*.")


def _between(declared: CoupledGroup, found: CoupledGroup) -> list[str]:
    for what in ("units", "blocks"):
        ours, theirs = getattr(declared, what), getattr(found, what)
        if ours != theirs:
            return [f"group {declared.name}: {ours} {what}, discovery finds {theirs}"]
    lines = []
    for spans, others in ((declared.spans, found.spans), (declared.buffers, found.buffers)):
        ours, theirs = _by_slot(spans), _by_slot(others)
        for slot in dict.fromkeys((*ours, *theirs)):
            difference = _of_slot(ours.get(slot, ()), theirs.get(slot, ()), declared.units)
            if difference:
                lines.append(f"group {declared.name}: {slot[0]} axis {slot[1]}: {difference}")
    return lines


def _by_slot(spans: Sequence[Span]) -> Mapping[Slot, tuple[Span, ...]]:
    slots: dict[Slot, tuple[Span, ...]] = {}
    for span in spans:
        key = span.parameter, span.axis
        slots[key] = (*slots.get(key, ()), span)
    return slots


def _of_slot(ours: Sequence[Span], theirs: Sequence[Span], units: int) -> str:
    if not ours:
        return f"missing; discovery finds {_maps(theirs)}"
    if not theirs:
        return f"extra; declared {_maps(ours)}, and discovery finds that no unit owns any of it"
    for unit in range(units):
        mine, other = _owned(ours, unit), _owned(theirs, unit)
        if mine != other:
            return f"unit {unit} owns {_runs(mine)}; discovery finds {_runs(other)}"
    for what in ("role", "offset"):
        mine, other = ({getattr(span, what) for span in spans} for spans in (ours, theirs))
        if mine != other:
            return f"{what} {_values(mine)}; discovery finds {_values(other)}"
    return ""


def _maps(spans: Sequence[Span]) -> str:
    return " and ".join(str(span.index) for span in spans)


def _owned(spans: Sequence[Span], unit: int) -> set[int]:
    return {index for span in spans for index in span.index.of(unit)}


def _values(values: Iterable[object]) -> str:
    return " and ".join(sorted(v.value if isinstance(v, Role) else str(v) for v in values))


def _runs(indices: set[int]) -> str:
    """``{0, 1, 2, 7}`` as ``0…2, 7``; after four runs, the total number of indices."""
    found = runs(sorted(indices))
    shown = ", ".join(str(first) if first == last else f"{first}…{last}" for first, last in found[:4])
    return f"{shown}, … ({len(indices)} indices)" if len(found) > 4 else shown
