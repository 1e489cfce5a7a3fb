"""The memory of tensors on any device: benchmarks measure with it, and tests check the plan against it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def storages(values: Any) -> Iterator[tuple[int, torch.UntypedStorage]]:
    """The storage of each tensor in nested ``values``, with its number."""
    for value in tree_iter(values):
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            yield storage._cdata, storage


class Allocations(TorchDispatchMode):
    """Bytes of all tensors that operations have made and that still live; the highest number is ``peak``."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # changed in place, or seen another way: nothing is made
        given = {number for number, _ in storages((args, kwargs))}
        for number, storage in storages(result):
            if number not in given:
                self.count(storage)
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        number, size = storage._cdata, storage.nbytes()
        if number in self.alive:
            return
        self.alive.add(number)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self.alive.discard(number)
            self.now -= size

        weakref.finalize(storage, gone)
