"""Progress of lm-eval, which draws a bar of its own for every step and has no setting to leave that out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def bars_to(report: Callable[[float], None]) -> Iterator[None]:
    """While active, lm-eval's own bars are not shown, and those of its models, which count the requests that were
    answered, call ``report`` with the finished share (0 to 1)."""
    import lm_eval.models.huggingface  # noqa: F401
    import tqdm

    class Hidden(tqdm.tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    class Counted:
        """As much of tqdm's interface as models use: a loop over items, or `update` after each."""

        def __init__(self, items: Any = None, total: float | None = None, **options: Any) -> None:
            self._items, self._hidden = items, options.get("disable")
            self._total = total if total is not None else len(items) if hasattr(items, "__len__") else None
            self._done = 0

        def __iter__(self) -> Iterator[Any]:
            for item in self._items:
                yield item
                self.update()

        def update(self, count: int = 1) -> None:
            self._done += count
            if self._total and not self._hidden:
                report(self._done / self._total)

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_, **__: None

    with ExitStack() as undo:
        # lm-eval's modules import the class by name, some inside functions.
        modules: list[tuple[Any, type]] = [(tqdm, Hidden)]
        for name, module in list(sys.modules.items()):
            if name.startswith("lm_eval.") and getattr(module, "tqdm", None) is not None:
                modules.append((module, Counted if ".models." in name else Hidden))
        for module, replacement in modules:
            undo.callback(setattr, module, "tqdm", module.tqdm)
            module.tqdm = replacement
        yield
