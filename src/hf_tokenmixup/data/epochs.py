"""Epoch of a dataset, shared with its wrappers and its data loader workers."""

import functools
import inspect
import itertools
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from types import FunctionType, MethodType, ModuleType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import nn

MAX_OBJECTS = 100_000
MAX_ITEMS = 10_000

_LEAVES = (
    str, bytes, bytearray, int, float, complex, type(None), type, ModuleType,
    torch.Tensor, torch.Generator, nn.Module, np.ndarray, np.generic, pa.Table, Image.Image,
)  # fmt: skip


class FollowsEpochs(Protocol):
    """Dataset whose examples depend on the epoch."""

    def set_epoch(self, epoch: int) -> None: ...


class SharedEpoch:
    """Epoch in shared memory, so that persistent workers of a data loader read the new epoch.

    Copies by `copy.deepcopy` or pickle have a separate epoch in shared memory. Worker processes share the epoch.
    """

    def __init__(self, epoch: int = 0) -> None:
        self._epoch = torch.tensor(int(epoch)).share_memory_()

    def get(self) -> int:
        return int(self._epoch)

    def set(self, epoch: int) -> None:
        self._epoch.fill_(int(epoch))

    def __deepcopy__(self, memo: dict) -> "SharedEpoch":
        return SharedEpoch(self.get())

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The tensor of a worker is in shared memory already, the tensor of a pickle file is not.
        self._epoch = state["_epoch"].share_memory_()


def epoch_followers(data: Any) -> list[FollowsEpochs]:
    """Find all objects with a method `set_epoch` inside a dataset, the innermost object first.

    Wrappers such as `Subset`, `ConcatDataset` or classes of users do not pass the epoch to their datasets. The search
    visits attributes, containers, closures and arguments of `functools.partial`: up to `MAX_OBJECTS` objects, and up
    to `MAX_ITEMS` items per container. It does not continue inside of objects with a `SharedEpoch`.

    Args:
        data: a dataset, or an object that contains datasets.
    """
    found, seen, queue = [], {id(data)}, deque([data])
    while queue and len(seen) < MAX_OBJECTS:
        current = queue.popleft()
        attributes = _attributes(current)
        # `__getattr__` of an inner object may return a value for any name.
        static = inspect.getattr_static(current, "set_epoch", None)
        if callable(getattr(current, "set_epoch", None) if current is data or static is not None else None):
            found.append(current)
        if any(isinstance(value, SharedEpoch) for value in attributes):
            continue
        for inner in itertools.chain(attributes, _items(current)):
            if not isinstance(inner, _LEAVES) and id(inner) not in seen:
                seen.add(id(inner))
                queue.append(inner)
    return found[::-1]


def _attributes(current: Any) -> list[Any]:
    """Return the values of an object's attributes."""
    try:
        values = list(object.__getattribute__(current, "__dict__").values())
    except AttributeError:
        values = []
    for kind in type(current).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            values.append(getattr(current, name, None))
    return values


def _items(current: Any) -> Iterator[Any]:
    """Yield the objects inside a container, a function or a `partial`."""
    if isinstance(current, dict):
        yield from itertools.islice(current.values(), MAX_ITEMS)
    elif isinstance(current, list | tuple | set | frozenset | deque):
        yield from itertools.islice(current, MAX_ITEMS)
    elif isinstance(current, FunctionType):
        for cell in current.__closure__ or ():
            # The cell of a variable without a value is empty.
            with suppress(ValueError):
                yield cell.cell_contents
        yield from (current.__defaults__, current.__kwdefaults__)
    elif isinstance(current, MethodType):
        yield current.__self__
    elif isinstance(current, functools.partial):
        yield from (current.func, current.args, current.keywords)
