"""What the plots of the pages have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save(figure: Any, file: Path) -> None:
    """Write an SVG, with a grid and a legend in each of its axes; the same figure gives the same bytes."""
    import matplotlib.pyplot as plt

    for axes in figure.axes:
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7)
    figure.tight_layout()
    plt.rcParams["svg.hashsalt"] = "llmpruner"
    figure.savefig(file, metadata={"Date": None})
