"""Whether the layers of a decoder compute, called one by one, what they compute in the model.

Each layer is called on its own inputs in a run of the whole model, and its outputs are compared with those of that run,
so that a difference in one layer does not carry over to the next. Half of the tokens must agree: rounding may route a
token to another expert, but a value that a layer lacks changes nearly all tokens.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import LlmprunerError, ModelError, first_line
from ..models.numbers import autocast_to
from ..models.positions import last_logits
from .calls import call_layer, first_output, hidden_of, not_walkable, record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 64
"""At the start of the first sample, which are compared."""
_TOLERANCE = 1e-3
"""Largest accepted relative difference of a token's hidden states, in the model's own precision."""


def shares_keys(model: PreTrainedModel) -> bool:
    """Whether layers use keys and values of earlier ones."""
    return bool(getattr(model.config.get_text_config(), "num_kv_shared_layers", 0))


class LayerCheck:
    """Runs the whole model on the first `TOKENS` of ``input_ids`` (samples, length), and keeps the hidden states
    between layers; `layer` compares one layer. Raises `ModelError` for states that are not finite, and
    `UnsupportedModelError` for layers that are not called one after the other.

    ``tuples``: as for `record`.
    """

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList, input_ids: torch.Tensor) -> None:
        self.model, self.layers = model, layers
        ids = input_ids[:1, :TOKENS]
        called: list[int] = []
        outputs: list[Any] = []
        self._before: list[torch.Tensor] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._before.append(hidden_of(args, kwargs))

        def after(number: int, output: Any) -> None:
            called.append(number)
            outputs.append(output)

        with contextlib.ExitStack() as stack:
            for number, layer in enumerate(layers):
                stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
                hook = layer.register_forward_hook(lambda _, __, output, number=number: after(number, output))
                stack.callback(hook.remove)
            # Gemma 4 computes layers that use keys and values of earlier ones for the tokens alone that need logits.
            last = {} if shares_keys(model) else last_logits(model)
            model(input_ids=ids, use_cache=False, **last)
        if called != list(range(len(layers))):
            raise not_walkable(model, "they are not called once each, in order")
        self._after = [first_output(output) for output in outputs]
        if not bool(torch.isfinite(self._after[-1]).all()):
            raise ModelError(
                "the hidden states of the calibration text are not finite numbers; the weights are damaged"
            )
        self.tuples = [len(output) - 1 if isinstance(output, tuple | list) else None for output in outputs]
        for number in range(1, len(layers)):
            self._compare(self._after[number - 1], self._before[number], number)
        self._calls = record(model, layers, ids, self.tuples)[0].calls

    def layer(self, number: int) -> None:
        """Call layer ``number``. Raises `UnsupportedModelError` where it fails, or gives other hidden states."""
        try:
            output = first_output(call_layer(self.layers[number], self._before[number], self._calls[number]))
        except LlmprunerError:
            raise
        except Exception as error:  # the whole model ran, so the layer lacks a value that another one provides
            raise not_walkable(self.model, f"{type(error).__name__}: {first_line(error)}") from error
        self._compare(output, self._after[number], number)

    def runs_in(self, products: torch.dtype, number: int) -> bool:
        """Whether operators of layer ``number`` take what autocast to ``products`` gives them with hidden states in
        float32. Where layers use keys and values of earlier ones (Gemma 3n), which a single layer lacks, it is said of
        models in ``products`` alone: others may have keys of another dtype than the queries."""
        if shares_keys(self.model):
            return bool(products == self.model.dtype)
        hidden = self._before[number].float()
        try:
            with autocast_to(hidden.device.type, products):
                call_layer(self.layers[number], hidden, self._calls[number])
        except RuntimeError:
            return False
        return True

    def _compare(self, found: torch.Tensor, wanted: torch.Tensor, number: int) -> None:
        wanted = wanted.float()
        differences = (found.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-12)
        typical = float(differences.median())
        if not typical < _TOLERANCE:
            seen = f"at layer {number}, hidden states differ by {typical:.2g} from those of the whole model"
            raise not_walkable(self.model, seen)
