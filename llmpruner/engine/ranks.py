"""The processes of one run, started by ``torchrun`` or ``accelerate launch``.

Whole micro-batches of the calibration text are spread over the processes, so only the order in which micro-batches are
summed depends on their number. Sums are reduced in their own dtype (float32 for Gram matrices and gradients, else
float64). The first process decides (text, plan, order of a layer's matrices) and sends it to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..errors import LlmprunerError, ProcessError, first_line
from ..models.devices import CPU, device_of, processes_on
from ..progress import launched

T = TypeVar("T")
K = TypeVar("K")

ENDED = "another process of this run ended; the same command continues after the last finished step"
_PATIENCE = timedelta(days=1)
"""How long a process waits for another, which may write calibration text. One that ends is noticed at once."""


class Ranks:
    """All processes call the methods that send, in one order; these raise `ProcessError` when another has ended."""

    def __init__(
        self, rank: int = 0, count: int = 1, group: Any = None, store: Any = None, sends: Collection[str] = ("cpu",)
    ) -> None:
        self.rank, self.count, self._group, self._store = rank, count, group, store
        self._sends = sends  # types of devices whose tensors are sent from where they are

    @staticmethod
    def current() -> Ranks:
        """The processes of a launcher, which connect the first time; without one, `SINGLE`."""
        return _connected() if launched() else SINGLE

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """The part of ``items`` that this process works on: consecutive ones, the first for the first process."""
        size, more = divmod(len(items), self.count)
        start = self.rank * size + min(self.rank, more)
        return items[start : start + size + (self.rank < more)]

    def owns(self, number: int) -> bool:
        """Whether this process does task ``number``; tasks are dealt out in turn."""
        return number % self.count == self.rank

    def from_first(self, make: Callable[[], T]) -> T:
        """The result of ``make`` in the first process, which alone calls it. Its `LlmprunerError` is raised in all."""
        if self.count == 1:
            return make()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = make()
            except ProcessError:
                raise
            except LlmprunerError as error:
                # Exceptions are rebuilt from their message, as some need other arguments.
                box[1] = type(error), str(error)
        with _noticing():
            dist.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))
        value, failed = box
        if failed is not None:
            kind, message = failed
            raise kind.__new__(kind, message)
        return cast("T", value)

    def sum_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor, in place, by its sum over all processes, which have the same shapes and dtypes."""
        for tensor in tensors if self.count > 1 else ():
            whole = self._to_send(tensor)
            with _noticing():
                dist.all_reduce(whole, group=self._group)
            if whole is not tensor:
                tensor.copy_(whole)

    def _to_send(self, tensor: torch.Tensor) -> torch.Tensor:
        return (tensor if tensor.device.type in self._sends else tensor.cpu()).contiguous()

    def totals(self, *numbers: float) -> tuple[float, ...]:
        """The sum of each number over all processes, in float64."""
        if self.count == 1:
            return numbers
        sums = torch.tensor(numbers, dtype=torch.float64)
        self.sum_([sums])
        return tuple(sums.tolist())

    def copy_from(self, number: int, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor, in place, by that of the process that owns task ``number``."""
        for tensor in tensors if self.count > 1 else ():
            whole = self._to_send(tensor)
            with _noticing():
                # As bytes: not every backend knows every dtype.
                dist.broadcast(whole.view(-1).view(torch.uint8), number % self.count, group=self._group)
            if whole.data_ptr() != tensor.data_ptr():
                tensor.copy_(whole)

    def merged(self, entries: Mapping[K, T]) -> dict[K, T]:
        """The entries of all processes, in one order; of a key, those of the first process that has it."""
        if self.count == 1:
            return dict(entries)
        gathered: list[Any] = [None] * self.count
        with _noticing():
            dist.all_gather_object(gathered, dict(entries), group=self._group)
        merged: dict[K, T] = {}
        for each in gathered:
            merged.update({key: value for key, value in each.items() if key not in merged})
        return merged

    def wait(self) -> None:
        """Until all processes are here."""
        self.totals(0.0)

    def noticing(self) -> AbstractContextManager[None]:
        """Turns failures of the connection, which a library uses inside, into a `ProcessError`."""
        return _noticing() if self.count > 1 else nullcontext()

    def claim(self, what: str) -> bool:
        """Whether this process is the first to ask for ``what`` in this run; also when others have ended."""
        if self._store is None:
            return True
        try:
            return bool(self._store.add(f"llmpruner/{what}", 1) == 1)
        except Exception:  # the process with the store ended: the first one, unless a launcher keeps the store
            return self.rank == 1

    def leave(self) -> None:
        """Disconnect from the others."""
        if self.count > 1:
            dist.destroy_process_group()
            _connected.cache_clear()


SINGLE = Ranks()
"""A run of one process."""


@cache
def _connected() -> Ranks:
    backend, sends = "gloo", ["cpu"]
    if (device := device_of("auto")) != CPU:
        # From now on, a device without a number is that of this process.
        torch.accelerator.set_device_index(device.index)
        # NCCL, and its like, need a device for each process.
        if processes_on(device) == 1 and (own := dist.get_default_backend_for_device(device)) != "gloo":
            backend, sends = f"cpu:gloo,{device.type}:{own}", ["cpu", device.type]
    try:
        if dist.is_initialized():  # by the script that calls the API, maybe for another device
            return Ranks(
                dist.get_rank(), dist.get_world_size(), dist.new_group(timeout=_PATIENCE, backend=backend), None, sends
            )
        store, rank, count = next(rendezvous("env://", timeout=_PATIENCE))
        store.set_timeout(_PATIENCE)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_PATIENCE)
    except (RuntimeError, ValueError, OSError) as error:
        raise ProcessError(f"the processes of this run cannot connect: {first_line(error)}") from error
    return Ranks(rank, count, None, store, sends)


@contextmanager
def _noticing() -> Iterator[None]:
    """Turns failures of the connection into a `ProcessError`."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, dist.DistError) or any(word in text for word in ("onnect", "peer", "imed out", "NCCL")):
            raise ProcessError(ENDED) from error
        raise
