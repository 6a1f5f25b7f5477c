"""What a trace, which has no values, takes for the positions at which a tensor is not zero: all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.overrides import TorchFunctionMode

Numbers = npt.NDArray[np.int64]

_MOVES: dict[str, Callable[..., Any]] = {
    "unbind": lambda numbers, dim=0: list(np.moveaxis(numbers, dim, 0)),
    "__getitem__": lambda numbers, index: numbers[index],
    "flatten": lambda numbers: numbers.reshape(-1),
    "squeeze": np.squeeze,
}
"""Operators whose results are known where their first argument is."""


class EveryPosition(TorchFunctionMode):
    """Inside the ``with`` statement, ``nonzero`` (and ``where`` of a condition alone) gives all positions.

    Code that loops over the experts that some token chose, and over the tokens that chose one, then runs for all of
    them, which shows all weights. The positions are known numbers, so that what they pick can be traced. ``unused``:
    how many positions at the end of a list are none: some code counts one expert more, which no token chooses.
    """

    def __init__(self, unused: int = 0) -> None:
        super().__init__()
        self._unused = unused
        self._known: dict[int, tuple[torch.Tensor, Numbers]] = {}
        """``id`` of a tensor → that tensor, so that its id is not used again, and its numbers."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "nonzero" or (name == "where" and len(args) == 1 and not kwargs):
            shape = tuple(args[0].shape)
            shape = (shape[0] - self._unused,) if len(shape) == 1 else shape
            positions = np.indices(shape).reshape(len(shape), -1).T
            in_columns = name == "where" or kwargs.get("as_tuple", False)
            return tuple(map(self._constant, positions.T)) if in_columns else self._constant(positions)
        if name == "__getitem__":
            args = (args[0], self._as_number(args[1]))
        numbers = self._numbers(args[0]) if args else None
        if numbers is not None and name in ("item", "__int__", "__index__"):
            return int(numbers.item())
        result = func(*args, **kwargs)
        if numbers is not None and name in _MOVES and not any(isinstance(a, torch.Tensor) for a in args[1:]):
            moved = _MOVES[name](numbers, *args[1:], **kwargs)
            for one, its in zip(result, moved, strict=True) if name == "unbind" else [(result, moved)]:
                self._known[id(one)] = one, np.asarray(its)
        return result

    def _constant(self, numbers: Numbers) -> torch.Tensor:
        tensor = torch.tensor(numbers.tolist(), dtype=torch.long)
        self._known[id(tensor)] = tensor, numbers
        return tensor

    def _numbers(self, tensor: Any) -> Numbers | None:
        found = self._known.get(id(tensor))
        return None if found is None else found[1]

    def _as_number(self, index: Any) -> Any:
        """``index``, with the number in place of a single known position."""
        numbers = self._numbers(index)
        return index if numbers is None or numbers.ndim else int(numbers)
