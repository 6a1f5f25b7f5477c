"""Ridge regression from sums over tokens, with the ridge chosen on tokens that were held out.

For inputs X (n × in), targets T (n × out) and old weights W₀ (out × in) the fit is

    W = argmin ‖X Wᵀ − T‖² + λ‖W − W₀‖²  =  (TᵀX + λW₀)(XᵀX + λI)⁻¹,

so that directions in which there are no data keep their old weights. λ is given as a share of the mean diagonal of XᵀX.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..engine.gram import add_gram, both_triangles

RIDGES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
_HELD_OUT = 8


@dataclass
class _Sums:
    """XᵀX (in × in, its lower triangle), XᵀT (in × out), ‖T‖² and n."""

    gram: torch.Tensor
    cross: torch.Tensor
    energy: float = 0.0
    rows: int = 0

    @classmethod
    def zeros(cls, width: int, out: int, device: torch.device) -> _Sums:
        return cls(torch.zeros(width, width, device=device), torch.zeros(width, out, device=device))

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        add_gram(self.gram, inputs)
        self.cross.addmm_(inputs.T, targets)
        self.energy += float(targets.square().sum(dtype=torch.float64))
        self.rows += len(inputs)

    def error(self, weight_IO: torch.Tensor) -> float:
        """Mean squared error of the fit, summed over the outputs."""
        gram, cross = both_triangles(self.gram).to(weight_IO.dtype), self.cross.to(weight_IO.dtype)
        fitted = (weight_IO * (gram @ weight_IO - 2 * cross)).sum()
        return (float(fitted) + self.energy) / max(self.rows, 1)


class NormalEquations:
    """Collects rows of inputs and targets; one row in eight is held out until the ridge is chosen."""

    def __init__(self, width: int, out: int, device: torch.device) -> None:
        self._fit = _Sums.zeros(width, out, device)
        self._held = _Sums.zeros(width, out, device)

    @property
    def rows(self) -> int:
        return self._fit.rows + self._held.rows

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """``inputs`` (n, in) and ``targets`` (n, out). The rows held out are the last ones of each call: neighbouring
        tokens are alike, and rows picked one by one would have their neighbours among the fitted."""
        split = len(inputs) - len(inputs) // _HELD_OUT
        inputs, targets = inputs.float(), targets.float()
        self._fit.add(inputs[:split], targets[:split])
        self._held.add(inputs[split:], targets[split:])

    def solve(self, old_OI: torch.Tensor) -> tuple[torch.Tensor, float | None]:
        """New weights (out, in), in float32, and the ridge they were fitted with; the old ones and None where nothing
        fits better on held-out rows."""
        old = old_OI.T.double()
        if self._fit.rows == 0 or self._held.rows == 0:
            return old_OI.float(), None
        errors = {ridge: self._held.error(_ridge(self._fit, old, ridge)) for ridge in RIDGES}
        best = min(errors, key=lambda ridge: errors[ridge])
        if not errors[best] < self._held.error(old):
            return old_OI.float(), None
        self._fit.gram += self._held.gram
        self._fit.cross += self._held.cross
        return _ridge(self._fit, old, best).T.float(), best


def _ridge(sums: _Sums, old_IO: torch.Tensor, ridge: float) -> torch.Tensor:
    gram = sums.gram.double()
    strength = ridge * float(gram.diagonal().mean())
    # An input that is always zero leaves the Gram matrix singular; the smallest number keeps it solvable.
    gram.diagonal().add_(max(strength, torch.finfo(torch.float32).tiny))
    # Reads the lower triangle alone.
    factor = torch.linalg.cholesky(gram)
    return torch.cholesky_solve(sums.cross.double() + strength * old_IO, factor)
