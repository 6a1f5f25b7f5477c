"""Names in ``config.json`` for programs that read it by themselves.

transformers 5 writes the rotary embedding as ``rope_parameters``. mlx-lm and programs from before transformers 5 read
``rope_theta`` and ``rope_scaling``; where these are missing they take defaults without a message, and write other text.
"""

from __future__ import annotations

import json
from pathlib import Path

from .record import read_json

_APART = ("rope_theta", "partial_rotary_factor")


def add_earlier_names(directory: Path) -> None:
    """State the rotary embedding in ``config.json`` under the earlier names as well, unless it differs by layer: there
    was no common name for that."""
    file = directory / "config.json"
    config = read_json(file)
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" not in rope:
        return
    names = {name: rope.pop(name) for name in _APART if name in rope}
    if rope.get("rope_type", "default") != "default":
        names["rope_scaling"] = rope
    file.write_text(json.dumps({**config, **names}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
