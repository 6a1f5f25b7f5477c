"""How a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

DEMO = "demo"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadOptions:
    """``dtype``: one of `DTYPES`; ``auto`` is as stored, except that float16 becomes float32 on a CPU."""

    family: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    revision: str | None = None
    trust_remote_code: bool = False
