"""Where the weights of a model come from: memory, or the files of a checkpoint, read layer by layer.

Code that looks at the values of weights does so inside `Weights.layer` or `Weights.outside`. Running a layer, or the
whole model, is possible anywhere: layers that are not in memory are read when they are called, and freed afterwards.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from ..models.empty import put_parameters
from ..models.shards import names_in
from ..structure.coupling import layer_number

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class Weights:
    """The weights of a model that is in memory as a whole. ``path``: of its module list of decoder layers."""

    streamed = False
    """Whether weights are read part by part; then values are there only inside `layer` and `outside`."""

    def __init__(self, model: PreTrainedModel, path: str) -> None:
        self.model, self.path = model, path

    def layer(self, number: int) -> contextlib.AbstractContextManager[None]:
        """While active, the parameters of a layer have their values; after it, changes in place are lost unless `keep`
        was called."""
        del number
        return contextlib.nullcontext()

    def outside(self) -> contextlib.AbstractContextManager[None]:
        """While active, the parameters outside the decoder layers have their values."""
        return contextlib.nullcontext()

    def part(self, number: int | None) -> contextlib.AbstractContextManager[None]:
        """`layer`, or `outside` for None."""
        return self.outside() if number is None else self.layer(number)

    def number(self, name: str) -> int | None:
        """The number of the layer that a parameter is in; None outside the layers."""
        return layer_number(name, self.path)

    def keep(self, names: Collection[str], file: Path) -> None:
        """Write the values of parameters, which were changed in place, to ``file``, and use them from now on."""
        tensors = {name: self.model.get_parameter(name).detach().contiguous() for name in sorted(names)}
        aside = file.with_suffix(".partial")
        save_file(tensors, aside)
        aside.replace(file)

    def use(self, file: Path) -> None:
        """Use the values that `keep` wrote to ``file``."""
        for name, tensor in load_file(file).items():
            self.model.get_parameter(name).data.copy_(tensor)


class Parts(Protocol):
    """Reads the weights of ``model``, whose parameters are on the meta device otherwise. A part is the number of a
    decoder layer, or None for everything outside the layers."""

    model: PreTrainedModel
    reads_ahead: bool
    """Whether `read` may be called in another thread, before the part is needed."""

    def read(self, part: int | None) -> dict[str, torch.Tensor]: ...

    def fill(self, part: int | None, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give the parameters of a part the values of `read`."""

    def empty(self, part: int | None) -> None:
        """Put the parameters of a part back on the meta device."""


class StreamedWeights(Weights):
    """Weights that are read part by part. At most two layers are in memory: the one in use, and the next one in the
    direction of the walk, which a thread reads meanwhile. ``device``: of the computation."""

    streamed = True

    def __init__(self, parts: Parts, path: str, device: torch.device) -> None:
        super().__init__(parts.model, path)
        self.device, self._parts = device, parts
        self._held: dict[int | None, int] = {}
        self._kept: dict[int | None, Path] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="llmpruner-read") if parts.reads_ahead else None
        self._ahead: tuple[int | None, Future[dict[str, torch.Tensor]]] | None = None
        self._last = -1
        self._names: dict[int | None, list[str]] = {}
        for name, _ in self.model.named_parameters():
            self._names.setdefault(self.number(name), []).append(name)
        self._layers: Any = self.model.get_submodule(path)
        for number, layer in enumerate(self._layers):
            layer.forward = self._reading(number, layer.forward)
        self.model.register_forward_pre_hook(lambda *_: self._enter(None))
        self.model.register_forward_hook(lambda *_: self._leave(None), always_call=True)

    @property
    def numbers(self) -> list[int | None]:
        """All parts."""
        return [None, *range(len(self._layers))]

    def layer(self, number: int) -> contextlib.AbstractContextManager[None]:
        return self._holding(number)

    def outside(self) -> contextlib.AbstractContextManager[None]:
        return self._holding(None)

    @contextlib.contextmanager
    def _holding(self, part: int | None) -> Iterator[None]:
        try:
            self._enter(part)
            yield
        finally:
            self._leave(part)

    def keep(self, names: Collection[str], file: Path) -> None:
        super().keep(names, file)
        self._kept[self.number(next(iter(names)))] = file

    def use(self, file: Path) -> None:
        self._kept[self.number(names_in(file)[0])] = file

    def like(self, model: PreTrainedModel) -> StreamedWeights:
        """The same weights for another model with the same parameters, on the meta device."""
        return StreamedWeights(PassedParts(model, self), self.path, self.device)

    def _reading(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def read_and_run(*args: Any, **kwargs: Any) -> Any:
            with self.layer(number):
                return forward(*args, **kwargs)

        return read_and_run

    def _enter(self, part: int | None) -> None:
        self._held[part] = self._held.get(part, 0) + 1
        if self._held[part] > 1:
            return
        self._parts.fill(part, self._read(part))
        if part in self._kept:
            super().use(self._kept[part])
        for name in self._names.get(part, ()):
            parameter = self.model.get_parameter(name)
            parameter.requires_grad_(False)
            if parameter.device != self.device:
                parameter.data = parameter.data.to(self.device)

    def _leave(self, part: int | None) -> None:
        self._held[part] -= 1
        if not self._held[part]:
            self._parts.empty(part)

    def _read(self, part: int | None) -> Mapping[str, torch.Tensor]:
        ahead, self._ahead = self._ahead, None
        found = ahead[1].result() if ahead is not None and ahead[0] == part else self._parts.read(part)
        if part is not None:
            following = part + (1 if part > self._last else -1)
            self._last = part
            if self._thread is not None and 0 <= following < len(self._layers):
                self._ahead = following, self._thread.submit(self._fetch, following)
        return found

    def _fetch(self, part: int) -> dict[str, torch.Tensor]:
        """`Parts.read`, and one byte of every page, so that files are read from the disk now."""
        found = self._parts.read(part)
        for tensor in filter(torch.numel, found.values()):
            tensor.flatten().view(torch.uint8)[:: mmap.PAGESIZE].max()
        return found


class PassedParts:
    """The `Parts` of a model with the parameters of another one, whose weights it gets."""

    reads_ahead = False

    def __init__(self, model: PreTrainedModel, source: StreamedWeights) -> None:
        self.model, self._source = model, source
        self._parts: dict[int | None, dict[str, nn.Parameter]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._parts.setdefault(source.number(name), {})[name] = parameter

    def read(self, part: int | None) -> dict[str, torch.Tensor]:
        source = self._source
        with source.part(part):
            return {name: tensor for name, tensor in source.model.state_dict().items() if source.number(name) == part}

    def fill(self, part: int | None, tensors: Mapping[str, torch.Tensor]) -> None:
        # Persistent buffers are among them.
        self.model.load_state_dict(dict(tensors), strict=False, assign=True)
        if part is None:
            self.model.tie_weights()

    def empty(self, part: int | None) -> None:
        put_parameters(self.model, self._parts[part])
