"""Exporting a model without weights, with one layer of every kind, to a graph of ATen operators."""

from __future__ import annotations

import contextlib
import copy
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import LlmprunerError, UnsupportedModelError, first_line
from ..models.messages import quiet_transformers, where
from ..models.meta import decoder_layers, meta_model
from ..models.modeling_llmpruner import drop_layers, per_layer_lists
from ..progress import only_errors

BATCH, TIME = 2, 7


@dataclass(frozen=True)
class Trace:
    """``program``: the exported graph of ``model``. ``layers``: path of the decoder layers. ``stands_for``: number of a
    traced layer → numbers of the real layers that it represents. ``stay``: why no layer can go; empty if they can."""

    program: torch.export.ExportedProgram
    model: PreTrainedModel
    layers: str
    stands_for: Mapping[int, tuple[int, ...]]
    stay: str


def trace(config: PreTrainedConfig, *, shallow: bool = True) -> Trace:
    """Export the model of ``config`` without weights; ``shallow``: one layer of every kind. `UnsupportedModelError`."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        part._attn_implementation, part._experts_implementation = "eager", "batched_mm"  # of ordinary operators
        # Router logits: the loss that balances experts, in which their number is counted, would be traced too.
        for name in ("use_cache", "output_router_logits"):
            if hasattr(part, name):
                setattr(part, name, False)
    try:
        # In 16 bits, some do not run, as some of their parameters stay in float32 (XLNet).
        model = meta_model(config, torch.float32)
    except LlmprunerError:
        raise
    except Exception as error:  # third-party constructors raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"[:200]
        raise UnsupportedModelError(f"a {config.model_type} model cannot be built: {reason}") from error
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.rope_type = "default"  # it would compare the length of the text, which a trace does not know
    layers = decoder_layers(model)
    modules: Any = model.get_submodule(layers)
    owners = Counter(id(p) for layer in modules.children() for p in layer.parameters())
    # Where a parameter belongs to several layers, one of them does not represent the others.
    if shallow and max(owners.values(), default=0) <= 1:
        try:
            return export(model, layers, keep_one_of_each(model, layers))
        except Exception:  # lists that are indexed by the original numbers, configurations that refuse another depth
            return trace(config, shallow=False)
    return export(model, layers, {n: (n,) for n in range(len(modules))})


def export(model: PreTrainedModel, layers: str, stands_for: Mapping[int, tuple[int, ...]]) -> Trace:
    """`torch.export` of the logits for a batch of token ids, without a cache."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    make_fake(model, mode)
    with mode:
        inputs = {"input_ids": torch.zeros(BATCH, TIME, dtype=torch.long), "use_cache": False}
    streams = [1]  # how many inputs of a layer are of hidden width, or outputs of the layers before
    calls: Counter[nn.Module] = Counter()
    outputs: dict[int, torch.Tensor] = {}

    def count(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        calls[layer] += 1
        states = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.is_floating_point()]
        wide = {id(v) for v in states if v.ndim > 2 and v.shape[-1] == states[0].shape[-1]}
        streams.append(max(len(wide), len({id(v) for v in states} & outputs.keys())))

    def keep(_layer: nn.Module, _args: Any, output: Any) -> None:
        # The tensors are kept so that their ids are not used again.
        outputs.update({id(v): v for v in (output if isinstance(output, tuple) else (output,))})

    for layer in model.get_submodule(layers).children():
        layer.register_forward_pre_hook(count, with_kwargs=True)
        layer.register_forward_hook(keep)
    exported = partial(torch.export.export, model, (), kwargs=inputs, strict=False)
    # A failed export logs names of symbols and prints the graph, which no option turns off.
    silent = contextlib.redirect_stderr(io.StringIO())
    with torch.no_grad(), quiet_transformers(), silent, only_errors("torch.fx.experimental.symbolic_shapes"):
        try:
            try:
                with EveryPosition():
                    program = exported()
            except IndexError:
                calls.clear()
                with EveryPosition(unused=1):
                    program = exported()
        except Exception as error:  # export reports unsupported code in many exception types
            statement, inside = where(error, model)
            reason = f"{type(error).__name__}: {first_line(error)}"[:200]
            reason += f" (at `{statement}` in {inside})" if inside else ""
            raise UnsupportedModelError(f"{type(model).__name__} cannot be traced: {reason}") from error
    repeated = max(calls.values(), default=0) > 1
    stay = "layers are given more than the residual stream" if max(streams) > 1 else ""
    return Trace(program, model, layers, stands_for, "a layer runs more than once" if repeated else stay)


def make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Make all tensors fake, ties included; on the meta device, constants of the forward pass would have no values."""
    known: dict[torch.Tensor, torch.Tensor] = {}

    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, real in ((name, tensor) for name, tensor in table.items() if tensor is not None):
                if real not in known:
                    with mode:
                        empty = torch.empty(real.shape, dtype=real.dtype)
                    known[real] = nn.Parameter(empty, requires_grad=False) if isinstance(real, nn.Parameter) else empty
                table[name] = known[real]  # type: ignore[assignment]


def keep_one_of_each(model: PreTrainedModel, layers: str) -> dict[int, tuple[int, ...]]:
    """Remove layers that equal an earlier one in modules, shapes and attributes. Returns `Trace.stands_for`."""
    modules: Any = model.get_submodule(layers)
    lists = per_layer_lists(model.config.get_text_config(), len(modules)).values()
    alike: dict[Any, list[int]] = {}
    for number, layer in enumerate(modules):
        types = tuple(str(values[number]) for values in lists)
        alike.setdefault((types, _signature(layer, number)), []).append(number)
    if len(alike) < len(modules):
        drop_layers(model, layers, [first for first, *_ in alike.values()])
    return {new: tuple(numbers) for new, numbers in enumerate(alike.values())}


def _signature(layer: nn.Module, number: int) -> Any:
    parameters = tuple((n, tuple(p.shape)) for n, p in layer.named_parameters())
    values = [(path, *item) for path, module in layer.named_modules() for item in sorted(vars(module).items())]
    plain = [each for each in values if isinstance(each[2], bool | str | int)]
    own = ("layer_idx", "layer_id", "layer_number")
    attributes = tuple(e for e in plain if e[1] not in own and (isinstance(e[2], bool) or e[2] != number))
    return tuple(type(m).__qualname__ for m in layer.modules()), parameters, attributes


Numbers = npt.NDArray[np.int64]

_MOVES: dict[str, Callable[..., Any]] = {
    "unbind": lambda numbers, dim=0: list(np.moveaxis(numbers, dim, 0)),
    "__getitem__": lambda numbers, index: numbers[index],
    "flatten": lambda numbers: numbers.reshape(-1),
    "squeeze": np.squeeze,
}
"""Operators whose results are known where their first argument is."""


class EveryPosition(TorchFunctionMode):
    """While active, ``nonzero`` (and ``where`` of a condition alone) gives all positions, so that loops over the chosen
    experts show all weights. ``unused``: experts at the end of a list that are counted, but do not exist."""

    def __init__(self, unused: int = 0) -> None:
        super().__init__()
        self._unused = unused
        self._known: dict[torch.Tensor, Numbers] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "nonzero" or (name == "where" and len(args) == 1 and not kwargs):
            shape = tuple(args[0].shape)
            shape = (shape[0] - self._unused,) if len(shape) == 1 else shape
            columns = np.indices(shape).reshape(len(shape), -1)
            in_columns = name == "where" or kwargs.get("as_tuple", False)
            return tuple(map(self._constant, columns)) if in_columns else self._constant(columns.T)
        if name == "__getitem__" and (index := self._numbers(args[1])) is not None and not index.ndim:
            args = (args[0], int(index))
        numbers = self._numbers(args[0]) if args else None
        if numbers is not None and name in ("item", "__int__", "__index__"):
            return int(numbers.item())
        result = func(*args, **kwargs)
        if numbers is not None and name in _MOVES and not any(isinstance(a, torch.Tensor) for a in args[1:]):
            moved = _MOVES[name](numbers, *args[1:], **kwargs)
            for tensor, values in zip(result, moved, strict=True) if name == "unbind" else [(result, moved)]:
                self._known[tensor] = np.asarray(values)
        return result

    def _constant(self, numbers: Numbers) -> torch.Tensor:
        tensor = torch.tensor(numbers.tolist(), dtype=torch.long)
        self._known[tensor] = numbers
        return tensor

    def _numbers(self, tensor: Any) -> Numbers | None:
        return self._known.get(tensor) if isinstance(tensor, torch.Tensor) else None
