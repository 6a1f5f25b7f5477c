"""Sums of the gradients of parameters over micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class GradientSums:
    """Sums over micro-batches: the gradient of the mean loss, and the mean squared gradient of single samples, float32.
    A single micro-batch needs no sum: ``grad`` is that of autograd, in the dtype of the parameter."""

    grad: torch.Tensor | None
    grad_sq: torch.Tensor | None

    @classmethod
    def like(cls, parameter: torch.Tensor, *, summed: bool, squares: bool) -> GradientSums:
        def zeros() -> torch.Tensor:
            return torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)

        return cls(zeros() if summed else None, zeros() if squares else None)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor in (self.grad, self.grad_sq) if tensor is not None]

    def add(self, parameter: nn.Parameter, share: float, scale: float) -> None:
        """``share``: of the mean; ``scale``: by which the loss was multiplied."""
        found, parameter.grad = parameter.grad, None
        if self.grad is None:
            self.grad = torch.zeros_like(parameter) if found is None else found
            return
        if found is None:
            return
        grad = found.float() if scale == 1 else found.float().div_(scale)
        self.grad.add_(grad, alpha=share)
        if self.grad_sq is not None:
            self.grad_sq.addcmul_(grad, grad, value=share)


@contextlib.contextmanager
def requiring_grad(parameters: Iterable[nn.Parameter], freeze: nn.Module | None = None) -> Iterator[None]:
    """While active, ``parameters`` require gradients, and all other parameters of ``freeze`` do not."""
    chosen = list(parameters)
    others = [] if freeze is None else list(freeze.parameters())
    flags = [(p, p.requires_grad) for p in (*chosen, *others)]
    for parameter in others:
        parameter.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
