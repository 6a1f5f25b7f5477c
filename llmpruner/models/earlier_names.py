"""Names in ``config.json`` for programs that read it by themselves.

transformers 5 writes the rotary embedding as ``rope_parameters``, and the number of experts as ``num_local_experts``.
mlx-lm and programs from before transformers 5 read ``rope_theta``, ``rope_scaling`` and ``num_experts``. Where the
first two are missing they take defaults without a message, and write other text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .record import read_json

_APART = ("rope_theta", "partial_rotary_factor")
_EXPERTS = "num_local_experts"


def add_earlier_names(directory: Path, attribute_map: Mapping[str, str]) -> None:
    """State the rotary embedding and the number of experts in ``config.json`` under the earlier names as well.

    ``attribute_map``: of the configuration's class, the other names that it reads. A rotary embedding that differs by
    layer stays as it is: there was no common name for that.
    """
    file = directory / "config.json"
    config = read_json(file)
    names = _rotary_names(dict(config.get("rope_parameters") or {}))
    if _EXPERTS in config:
        names |= {name: config[_EXPERTS] for name, own in attribute_map.items() if own == _EXPERTS}
    file.write_text(json.dumps({**config, **names}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _rotary_names(rope: dict[str, Any]) -> dict[str, Any]:
    if "rope_theta" not in rope:
        return {}
    names = {name: rope.pop(name) for name in _APART if name in rope}
    return names | ({"rope_scaling": rope} if rope.get("rope_type", "default") != "default" else {})
