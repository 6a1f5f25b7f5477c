"""Numbers as people read them. Imports nothing."""

from __future__ import annotations


def count_text(value: float) -> str:
    """``106,202,880`` as ``106.20 M``."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:,.0f}"


def bytes_text(value: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def counted(number: int | float, what: str) -> str:
    """``1 step``, ``2 steps``, ``1,200 steps``, ``0.5 steps``; ``what`` in the singular."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {what}" if number == 1 else f"{shown} {what}s"
