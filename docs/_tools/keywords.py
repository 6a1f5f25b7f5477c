"""``llmpruner/keywords.py``: the settings as typed keywords, for type checkers and editors."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from llmpruner import settings

MODELS = {
    "LoadKeywords": settings.LoadSettings,
    "PruneKeywords": settings.PruneSettings,
    "RecoverKeywords": settings.RecoverSettings,
    "EvaluateKeywords": settings.EvaluateSettings,
    "BenchKeywords": settings.BenchSettings,
    "GenerateKeywords": settings.GenerateSettings,
    "ExportKeywords": settings.ExportSettings,
}
WIDER = {
    "kinds": "str | Sequence[str]",
    "tasks": "str | Sequence[str]",
    "metrics": "str | Sequence[str]",
    "layers": "str | Sequence[int]",
    "batch": "str | int | Sequence[int]",
    "prompt": "str | int | Sequence[int]",
    "target_params": "str | float",
    "settings": "Mapping[str, Mapping[str, Any]]",
    "calibration": "str | Path",
    "data": "str | Path",
    "perplexity": "str | Path",
}
"""Fields whose validators take more than the type that they hold."""


def render() -> str:
    lines = [
        '"""Settings as typed keywords. Written by docs/_tools from `llmpruner.settings`; do not edit."""',
        "",
        "from __future__ import annotations",
        "",
        "from collections.abc import Mapping, Sequence",
        "from pathlib import Path",
        "from typing import Any, Literal, TypedDict",
        "",
        "from typing_extensions import Required",
    ]
    for name, model in MODELS.items():
        lines += ["", "", f"class {name}(TypedDict, total=False):"]
        for field, info in model.model_fields.items():
            if (name, field) == ("PruneKeywords", "ratio"):
                continue  # one for `plan`, several for `prune`, so they declare it
            text = WIDER.get(field) or _text(info.annotation)
            if field in WIDER and _optional(info.annotation):
                text += " | None"
            lines.append(f"    {field}: {f'Required[{text}]' if info.is_required() else text}")
    return "\n".join(lines) + "\n"


def _optional(annotation: Any) -> bool:
    return type(None) in get_args(annotation)


def _text(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return f"Literal[{', '.join(json.dumps(a) for a in arguments)}]"
    if origin in (Union, type(int | str)):
        return " | ".join("None" if a is type(None) else _text(a) for a in arguments)
    if hasattr(annotation, "__metadata__"):
        return _text(arguments[0])
    return annotation.__name__ if inspect.isclass(annotation) and origin is None else str(annotation)


def write() -> None:
    Path(settings.__file__).with_name("keywords.py").write_text(render(), encoding="utf-8")
